"""What a scene consists of: textured rectangles with light baked in, and the boxes that cast shadows."""
from dataclasses import dataclass

import numpy as np
from PIL import Image

UP = np.array([0.0, 0, 1])


class Face:
    """A textured rectangle, visible from one side."""

    def __init__(self, centre, normal, up, size, texture):
        """Place a rectangle. The scene's lamps light it later.

        centre, normal, up: 3 numbers each; the texture's first row is at the end of `up`. size: width and height in
        metres.
        texture: H x W x 3, colours without light, 0 to 255.
        """
        self.normal, self.texture = normal, texture
        self.u, self.v = np.cross(up, normal) * size[0], -up * size[1]
        self.origin = centre - self.u / 2 - self.v / 2

    def light(self, lightmap):
        """Bake light (h x w x 3, 1 for full light) into the texture, and build its mipmap of halved sizes."""
        size = self.texture.shape[1::-1]
        light = np.dstack([Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC)
                           for channel in np.moveaxis(lightmap.astype(np.float32), 2, 0)])
        level = Image.fromarray((self.texture * light).clip(0, 255).astype(np.uint8))
        levels = [np.asarray(level)]
        while min(level.size) > 1:
            level = level.reduce(2)
            levels.append(np.asarray(level))
        self.shapes = np.array([level.shape[:2] for level in levels])
        self.starts = np.cumsum([0, *(self.shapes.prod(axis=1)[:-1])])
        self.texels = np.concatenate([level.reshape(-1, 3) for level in levels])

    def points(self, per_metre):
        """A grid of points on the face, h x w x 3, about `per_metre` points per metre."""
        w, h = (max(2, round(np.linalg.norm(edge) * per_metre)) for edge in (self.u, self.v))
        s, t = (np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h
        return self.origin + s[None, :, None] * self.u + t[:, None, None] * self.v


class Box:
    """A box that stands upright, turned about the vertical."""

    def __init__(self, centre, size, yaw=0.0):
        """Place a box. centre: x, y, z; size: width, depth, height in metres; yaw: radians."""
        self.centre, self.size = np.asarray(centre, float), np.asarray(size, float)
        self.axes = np.array([[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], UP])

    def faces(self, front, side=None, top=None, bottom=False):
        """The faces of the box: front, back, two sides, top, and the bottom if asked for.

        front, side, top: functions of (width, height) in metres that make a texture. The front is at the negative end
        of the depth. By default sides and top look like the front.
        """
        side, top = side or front, top or front
        (w, d, h), (x, y, z), centre = self.size, self.axes, self.centre
        faces = [
            Face(centre - y * d / 2, -y, z, (w, h), front(w, h)),
            Face(centre + y * d / 2, y, z, (w, h), side(w, h)),
            Face(centre - x * w / 2, -x, z, (d, h), side(d, h)),
            Face(centre + x * w / 2, x, z, (d, h), side(d, h)),
            Face(centre + z * h / 2, z, y, (w, d), top(w, d)),
            Face(centre - z * h / 2, -z, y, (w, d), side(w, d)),  # painted in any case: seeds keep their scenes
        ]
        return faces if bottom else faces[:-1]

    def blocks(self, points, directions, reach=np.inf):
        """Which rays (points and directions, N x 3) hit the box within `reach` (in lengths of the directions): N."""
        start, step = (points - self.centre) @ self.axes.T, directions @ self.axes.T
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = (np.array([-1.0, 1])[:, None, None] * self.size / 2 - start) / step
        (x0, y0, z0), (x1, y1, z1) = np.fmin(*ends).T, np.fmax(*ends).T
        enter, leave = np.maximum(np.maximum(x0, y0), z0), np.minimum(np.minimum(x1, y1), z1)  # .max(axis=1) is slow
        return (enter < leave) & (leave > 1e-3) & (enter < reach)

    def distance(self, points):
        """The distance in metres of points (N x 3) from the box, 0 inside: N."""
        outside = np.abs((points - self.centre) @ self.axes.T) - self.size / 2
        return np.linalg.norm(outside.clip(min=0), axis=1)


@dataclass
class Scene:
    """A scene to render.

    faces: the visible surfaces. boxes: what casts shadows, and what a camera keeps away from.
    cameras: the lowest and the highest (x, y, z) of camera positions. targets: the same of the points that cameras look
    at.
    excursion: metres along x and a turn in degrees, by which the test walk leaves what the training walks see.
    """

    faces: list
    boxes: list
    cameras: tuple
    targets: tuple
    excursion: tuple = (0, 0)

    def bake(self, lamps, ambient, reach, per_metre, ambient_rays):
        """Light the faces.

        lamps: (position, colour, fading distance in metres) each. A lamp that is far away and does not fade is the sun.
        ambient: a colour, dimmed by the fraction of `ambient_rays` (directions N x 3, in a frame with the normal last)
        that a box blocks within `reach` metres. per_metre: sample points per metre.
        """
        for face in self.faces:
            grid = face.points(per_metre)
            points = grid.reshape(-1, 3) + 1e-3 * face.normal
            frame = np.stack((face.u / np.linalg.norm(face.u), face.v / np.linalg.norm(face.v), face.normal))
            near = self._near(points, reach)
            blocked = [_blocked(near, points, np.broadcast_to(ray, points.shape), reach)
                       for ray in ambient_rays @ frame]
            light = (1 - np.mean(blocked, axis=0))[:, None] * np.asarray(ambient)
            for position, colour, fading in lamps:
                rays = position - points
                distances = np.linalg.norm(rays, axis=1)
                strength = (rays @ face.normal / distances).clip(min=0) / (1 + (distances / fading) ** 2)
                light = light + (strength * ~_blocked(self.boxes, points, rays, 1))[:, None] * np.asarray(colour)
            face.light(light.reshape(grid.shape))

    def _near(self, points, reach):
        """The boxes that may be within `reach` metres of some of the points (N x 3)."""
        centre = points.mean(axis=0)
        radius = np.linalg.norm(points - centre, axis=1).max()
        return [box for box in self.boxes if box.distance(centre[None])[0] <= radius + reach + 1e-3]


def _blocked(boxes, points, directions, reach):
    """Which rays (points and directions, N x 3) hit one of the boxes within `reach` lengths of the directions: N."""
    blocked = np.zeros(len(points), bool)
    for box in boxes:
        blocked |= box.blocks(points, directions, reach)
    return blocked


def hemisphere(n):
    """Directions over a hemisphere around the last axis, denser towards it as the cosine: n x 3."""
    i = np.arange(n) + 0.5
    radius, angle = np.sqrt(i / n), np.pi * (1 + 5 ** 0.5) * i
    return np.stack((radius * np.cos(angle), radius * np.sin(angle), np.sqrt(1 - i / n)), axis=1)
