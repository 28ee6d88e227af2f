"""Label files, frames with their poses, and the commands that prepare them."""
