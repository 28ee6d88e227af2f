"""Label files and camera pose datasets."""
