"""Rendering: the faces of a scene as a pinhole camera sees them."""
import numpy as np

from datasets.synthetic_scenes.surfaces import UP

NEAR = 0.02  # metres: what is nearer to the camera is invisible


def camera_rotation(direction, roll=0.0):
    """Camera-to-world rotation, 3 x 3, of a camera that looks along a direction (3), rolled by `roll` degrees."""
    forward = direction / np.linalg.norm(direction)
    right = np.cross(forward, UP) / np.linalg.norm(np.cross(forward, UP))
    down, roll = np.cross(forward, right), np.radians(roll)
    return np.stack((np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right, forward),
                    axis=1)


def render(faces, position, rotation, width, height):
    """An image of lit faces, height x width x 3 (uint8).

    position: the camera's (3). rotation: camera-to-world, 3 x 3. width, height: pixels.
    """
    focal = 585 / 640 * width
    columns = ((np.arange(width) + 0.5 - width / 2) / focal).astype(np.float32)
    rows = ((np.arange(height) + 0.5 - height / 2) / focal).astype(np.float32)
    nearness = np.zeros((height, width), np.float32)  # one over the depth
    nearest = np.full((height, width), -1, np.int16)  # the index of the face in `visible`
    visible = []
    for face in faces:
        if (face.origin - position) @ face.normal >= 0:
            continue
        # A point of the face is origin + s u + t v. In camera axes it is depth times (column, row, 1). So the inverse
        # of [u v origin] takes (column, row, 1) to (s, t, 1) over the depth: three functions linear in the image.
        edges = np.stack((face.u, face.v, face.origin - position), axis=1)
        camera = rotation.T @ edges
        window = _image_window(camera, columns, rows)
        if window is None:
            continue
        linear = np.linalg.inv(camera)
        s, t, n = ((a * columns[window[1]] + c) + (b * rows[window[0]])[:, None]
                   for a, b, c in linear.astype(np.float32))
        inside = (n > nearness[window]) & (s >= 0) & (s <= n) & (t >= 0) & (t <= n)
        np.copyto(nearness[window], n, where=inside)
        np.copyto(nearest[window], len(visible), where=inside)
        visible.append((face, window, s, t, abs(np.linalg.det(linear)) / focal ** 2))

    image = np.zeros((height, width, 3), np.uint8)
    for i, (face, window, s, t, area) in enumerate(visible):
        pixels = nearest[window] == i
        if pixels.any():
            n = nearness[window][pixels]
            # A pixel covers area / n^3 of the face's unit square: choose the mipmap level with about that many texels.
            level = (0.5 * np.log2(area * face.shapes[0].prod() / n ** 3)).round()
            level = level.clip(0, len(face.shapes) - 1).astype(int)
            image[window][pixels] = _sample(face, s[pixels] / n, t[pixels] / n, level)
    return image


def _image_window(camera, columns, rows):
    """The slices of rows and columns of the image that contain a face, or None for a face outside the image.

    camera: the face's u, v and origin in camera axes, 3 x 3. columns, rows: coordinates of the pixels at depth 1.
    """
    u, v, origin = camera.T
    corners = np.stack((origin, origin + u, origin + u + v, origin + v))
    if (corners[:, 2] < NEAR).any():  # cut at the near plane
        following = np.roll(corners, -1, axis=0)
        crossing = (corners[:, 2] < NEAR) != (following[:, 2] < NEAR)
        fraction = (NEAR - corners[crossing, 2]) / (following - corners)[crossing, 2]
        cuts = corners[crossing] + fraction[:, None] * (following - corners)[crossing]
        corners = np.concatenate((corners[corners[:, 2] >= NEAR], cuts))
        if not len(corners):
            return None
    x, y = (corners[:, :2] / corners[:, 2:]).T
    left, right = np.searchsorted(columns, (x.min(), x.max()))
    top, bottom = np.searchsorted(rows, (y.min(), y.max()))
    return None if left == right or top == bottom else (slice(top, bottom), slice(left, right))


def _sample(face, s, t, level):
    """Colours, N x 3, of points (s, t) from 0 to 1 on a face, interpolated bilinearly in a mipmap level (N each)."""
    heights, widths = face.shapes[level].T.astype(np.float32)
    x, y = (s * widths - 0.5).clip(0, widths - 1), (t * heights - 0.5).clip(0, heights - 1)
    x0, y0 = x.astype(np.int32), y.astype(np.int32)
    step_x, step_y = (x0 < widths - 1), (y0 < heights - 1) * widths.astype(np.int32)
    start = face.starts[level] + y0 * widths.astype(np.int32) + x0
    x, y = (x - x0)[:, None], (y - y0)[:, None]
    upper = face.texels[start] * (1 - x) + face.texels[start + step_x] * x
    lower = face.texels[start + step_y] * (1 - x) + face.texels[start + step_y + step_x] * x
    return (upper * (1 - y) + lower * y + 0.5).astype(np.uint8)
