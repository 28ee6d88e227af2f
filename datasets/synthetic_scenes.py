"""Textured 3-D scenes rendered with numpy, with exact poses, in the layouts of the official datasets.

    python -m datasets.synthetic_scenes OUT [--scenes room yard ...] [--layout 7Scenes|cambridge]

A room is a few metres wide and furnished; a yard lies between facades, tens of metres wide. Scenes are made of textured
rectangles with light and shadows baked in. The world's z axis points up; a camera's axes point right, down and forward,
and its focal length is that of 7Scenes, 585 pixels at 640 wide, with the principal point in the middle of the image (the
centre of the top left pixel is at 0.5, 0.5).
"""
import argparse
import os
import shutil

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm
from transforms3d.quaternions import mat2quat

from util.errors import UserError

TRAIN_SEQUENCES = 6  # and one for testing
APART = (0.05, 2)  # metres or degrees: how far a test frame is from every training frame, at least
CLEARANCE = 0.25  # metres between a camera and what stands around
MOST_TRIES = 2000  # for a path
UP = np.array([0.0, 0, 1])
NEAR = 0.02  # metres: what is nearer to the camera is not seen


# --- Surfaces ---------------------------------------------------------------------------------------------------------

class Face:
    """A textured rectangle, seen from one side.

    centre, normal, up: 3 numbers each; the texture's first row is at the end of `up`. size: width and height in metres.
    texture: H x W x 3, colours without light, 0 to 255.
    """

    def __init__(self, centre, normal, up, size, texture):
        self.normal, self.texture = normal, texture
        self.u, self.v = np.cross(up, normal) * size[0], -up * size[1]
        self.origin = centre - self.u / 2 - self.v / 2

    def light(self, lightmap):
        """Bake light (h x w x 3, 1 for full light) into the texture, and make its pyramid of halved sizes."""
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
        """A grid of points on the face, h x w x 3, about so many a metre."""
        w, h = (max(2, round(np.linalg.norm(edge) * per_metre)) for edge in (self.u, self.v))
        s, t = (np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h
        return self.origin + s[None, :, None] * self.u + t[:, None, None] * self.v


class Box:
    """A box on its base, turned about the vertical: its centre (x, y, z), size (width, depth, height) and yaw (radians)."""

    def __init__(self, centre, size, yaw=0.0):
        self.centre, self.size = np.asarray(centre, float), np.asarray(size, float)
        self.axes = np.array([[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], UP])

    def faces(self, front, side=None, top=None, bottom=False):
        """The faces of the box. front, side, top: functions of (width, height) in metres that make a texture; the front is
        at the negative end of the depth, and what is not given is as the front."""
        side, top = side or front, top or front
        (w, d, h), (x, y, z) = self.size, self.axes
        faces = [Face(self.centre - y * d / 2, -y, z, (w, h), front(w, h)), Face(self.centre + y * d / 2, y, z, (w, h), side(w, h)),
                 Face(self.centre - x * w / 2, -x, z, (d, h), side(d, h)), Face(self.centre + x * w / 2, x, z, (d, h), side(d, h)),
                 Face(self.centre + z * h / 2, z, y, (w, d), top(w, d))]
        return faces + [Face(self.centre - z * h / 2, -z, y, (w, d), side(w, d))] * bottom

    def blocks(self, points, directions, reach=np.inf):
        """Which rays (N x 3 points and directions) meet the box within `reach` (in lengths of the directions)."""
        start, step = (points - self.centre) @ self.axes.T, directions @ self.axes.T
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = (np.array([-1.0, 1])[:, None, None] * self.size / 2 - start) / step
        enter, leave = np.fmin(*ends).max(axis=1), np.fmax(*ends).min(axis=1)
        return (enter < leave) & (leave > 1e-3) & (enter < reach)

    def distance(self, points):
        """The distance of points (N x 3) from the box, 0 inside."""
        outside = np.abs((points - self.centre) @ self.axes.T) - self.size / 2
        return np.linalg.norm(outside.clip(min=0), axis=1)


# --- Paint ------------------------------------------------------------------------------------------------------------

class Painter:
    """Makes textures that do not repeat. density: texels a metre. Every method but `noise` and `draw` gives a function of
    (width, height) in metres, as Box.faces takes them."""

    def __init__(self, random, density):
        self.random, self.density = random, density

    def noise(self, shape, cell):
        """Smooth noise, H x W, of standard deviation about 1; cell: its grain (vertical, horizontal) in metres."""
        grid = [max(2, int(n / (c * self.density)) + 2) for n, c in zip(shape, cell)]
        values = Image.fromarray(self.random.standard_normal(grid).astype(np.float32))
        return 1.5 * np.asarray(values.resize(shape[::-1], Image.Resampling.BICUBIC))

    def colour(self, low=60, high=230, saturation=1.2):
        """A random colour."""
        colour = self.random.uniform(low, high, 3)
        return (colour.mean() + saturation * (colour - colour.mean())).clip(20, 245)

    def timber(self):
        """A random colour of wood."""
        return np.array((165, 120, 80)) * self.random.uniform(0.55, 1.2) + self.random.normal(0, 10, 3)

    def plain(self, colour, contrast=7, cells=((1, 1), (0.25, 0.25), (0.05, 0.05), (0.02, 0.02))):
        """A colour with noise of several grains."""
        def texture(w, h):
            shape = max(2, round(h * self.density)), max(2, round(w * self.density))
            return np.asarray(colour) + contrast * sum(self.noise(shape, cell) for cell in cells)[..., None]
        return texture

    def wood(self, colour, contrast=9):
        """Wood with its grain along the width."""
        return self.plain(colour, contrast, ((0.5, 0.5), (0.01, 0.4), (0.03, 1)))

    def draw(self, texture, paint):
        """A texture with what paint does to an ImageDraw of it."""
        image = Image.fromarray(texture.clip(0, 255).astype(np.uint8))
        paint(ImageDraw.Draw(image))
        return np.asarray(image).astype(float)

    def rectangle(self, draw, x, y, w, h, colour, outline=None, thickness=0.02):
        """A rectangle in metres from the top left corner, with a frame inside it if `outline` is given."""
        box = [x * self.density, y * self.density, max((x + w) * self.density - 1, x * self.density),
               max((y + h) * self.density - 1, y * self.density)]
        draw.rectangle(box, fill=_ink(colour), outline=outline if outline is None else _ink(outline),
                       width=max(1, round(thickness * self.density)))

    def picture(self, draw, x, y, w, h):
        """A framed picture of random shapes."""
        edge = min(0.04, w / 8, h / 8)
        self.rectangle(draw, x, y, w, h, self.colour(), self.colour(20, 120), edge)
        for _ in range(self.random.integers(6, 14)):
            left, right = x + edge + np.sort(self.random.uniform(0, w - 2 * edge, 2))
            top, bottom = y + edge + np.sort(self.random.uniform(0, h - 2 * edge, 2))
            shape = self.random.choice([draw.rectangle, draw.ellipse])
            shape([value * self.density for value in (left, top, right, bottom)], fill=_ink(self.colour(20, 250)))

    def wall(self, colour, window=False, door=False):
        """An inner wall with pictures and, on request, a window and a door."""
        def texture(w, h):
            def paint(draw):
                self.rectangle(draw, 0, h - 0.1, w, 0.1, np.multiply(colour, 0.5))
                places = [(x, min(0.95, w / n * 0.8)) for n in [max(1, int(w))] for x in (np.arange(n) + 0.1) * w / n]
                for i, (x, width) in enumerate(self.random.permutation(places)):
                    if door and i == 0:
                        self.rectangle(draw, x, h - 2.05, 0.9, 2.05, self.colour(50, 150), self.colour(30, 90), 0.06)
                        for y in (h - 1.9, h - 0.95):
                            self.rectangle(draw, x + 0.17, y, 0.56, 0.75, self.colour(70, 170), (60, 50, 40))
                        self.rectangle(draw, x + 0.75, h - 1.05, 0.09, 0.03, (220, 200, 120))
                    elif window and i == 1:
                        self.rectangle(draw, x, 0.5, width, 1.2, (190, 215, 245), (240, 240, 235), 0.06)
                        self.rectangle(draw, x + 0.06, 1.25, width - 0.12, 0.39, (90, 130, 80))
                        self.rectangle(draw, x + width / 2 - 0.02, 0.5, 0.04, 1.2, (240, 240, 235))
                    else:
                        height = self.random.uniform(0.4, 0.9)
                        self.picture(draw, x, self.random.uniform(0.35, 0.7), width * self.random.uniform(0.6, 1), height)
            return self.draw(self.plain(colour)(w, h), paint)
        return texture

    def planks(self, colour, rug=None):
        """A wooden floor, with a rug in its middle if `rug` (width and depth) is given."""
        def texture(w, h):
            floor = self.wood(colour)(w, h)
            step = max(1, round(0.15 * self.density))
            for top in range(0, len(floor), step):
                left = 0
                while left < floor.shape[1]:
                    length = round(self.random.uniform(0.6, 1.6) * self.density)
                    plank = floor[top:top + step, left:left + length]
                    plank += 14 * self.random.standard_normal() + 3 * self.random.standard_normal(3)
                    plank[-1:] -= 40
                    plank[:, -1:] -= 40
                    left += length

            def paint(draw):
                if rug is not None:
                    x, y = (w - rug[0]) / 2, (h - rug[1]) / 2
                    for i in range(6):
                        d = 0.12 * i
                        self.rectangle(draw, x + d, y + d, rug[0] - 2 * d, rug[1] - 2 * d, self.colour())
                    for _ in range(60):
                        a, b, size = self.random.uniform(0, rug[0] - 0.1), self.random.uniform(0, rug[1] - 0.1), 0.1
                        self.rectangle(draw, x + a, y + b, size * self.random.uniform(0.4, 1), size, self.colour())
            return self.draw(floor, paint)
        return texture

    def ceiling(self, lamps):
        """A ceiling with beams and bright panels, at (x, y) from its centre."""
        def texture(w, h):
            def paint(draw):
                for x in np.arange(0.4, w, 0.9):
                    self.rectangle(draw, x, 0, 0.12, h, self.colour(110, 160))
                for x, y in lamps:
                    self.rectangle(draw, w / 2 - x - 0.3, h / 2 + y - 0.15, 0.6, 0.3, (255, 255, 245), (170, 170, 170), 0.03)
            return self.draw(self.plain((215, 212, 205), 6)(w, h), paint)
        return texture

    def books(self, colour):
        """Shelves full of books."""
        def texture(w, h):
            def paint(draw):
                for y in np.arange(0.03, h - 0.1, 0.32):
                    self.rectangle(draw, 0.03, y, w - 0.06, 0.29, np.multiply(colour, 0.35))
                    x = 0.04
                    while x < w - 0.12:
                        width, height = self.random.uniform(0.02, 0.07), self.random.uniform(0.17, 0.28)
                        if self.random.random() < 0.9:
                            book = self.colour(30, 235)
                            self.rectangle(draw, x, y + 0.29 - height, width, height, book)
                            self.rectangle(draw, x, y + 0.29 - 0.8 * height, width, 0.03, 255 - book)
                        x += width
            return self.draw(self.wood(colour)(w, h), paint)
        return texture

    def drawers(self, colour, columns, rows):
        """A front of drawers or doors with handles."""
        def texture(w, h):
            def paint(draw):
                for x in np.arange(columns) * w / columns:
                    for y in np.arange(rows) * h / rows:
                        tone = np.asarray(colour) + self.random.normal(0, 18)
                        self.rectangle(draw, x + 0.02, y + 0.02, w / columns - 0.04, h / rows - 0.04, tone, np.multiply(colour, 0.5))
                        self.rectangle(draw, x + w / columns / 2 - 0.06, y + h / rows / 2, 0.12, 0.025, (225, 220, 210))
            return self.draw(self.wood(colour)(w, h), paint)
        return texture

    def printed(self, colour):
        """A surface with a label on it, such as a carton's."""
        def texture(w, h):
            def paint(draw):
                self.picture(draw, 0.15 * w, 0.2 * h, 0.6 * w, 0.55 * h)
                self.rectangle(draw, 0, 0.45 * h, w, 0.06, np.multiply(colour, 0.8))
            return self.draw(self.plain(colour, 8)(w, h), paint)
        return texture

    def facade(self, colour, storey=3.2):
        """The front of a house: windows that differ, doors, shop signs, stains."""
        def texture(w, h):
            house = self.plain(colour, 9, ((6, 6), (1.5, 1.5), (0.4, 0.4), (0.1, 0.1)))(w, h)
            house[::max(2, round(0.4 * self.density))] *= 0.88  # courses of stone

            def paint(draw):
                n = max(2, int(w / self.random.uniform(2.6, 3.6)))
                frame = self.colour(150, 250)
                for floor in range(max(1, int(h / storey))):
                    y = h - (floor + 1) * storey
                    if floor:
                        self.rectangle(draw, 0, y + storey - 0.15, w, 0.25, np.multiply(colour, 0.75))
                    for i in range(n):
                        x = (i + 0.22) * w / n
                        width = 0.56 * w / n
                        if floor == 0 and self.random.random() < 0.5:
                            self.rectangle(draw, x, y + 0.6, width, storey - 0.6, self.colour(40, 160), frame, 0.15)
                            self.rectangle(draw, x - 0.3, y + 0.15, width + 0.6, 0.6, self.colour(40, 240), (40, 40, 40), 0.05)
                            for a in np.arange(x - 0.1, x + width, 0.35)[:self.random.integers(2, 7)]:
                                self.rectangle(draw, a, y + 0.28, 0.2, 0.34, self.colour(20, 250))
                        elif self.random.random() < 0.88:
                            glass = np.array((70, 90, 120)) + self.random.normal(0, 25)
                            self.rectangle(draw, x, y + 0.7, width, 1.7, glass, frame, 0.12)
                            if self.random.random() < 0.5:
                                drop = self.random.uniform(0.3, 1.4)
                                self.rectangle(draw, x + 0.12, y + 0.82, width - 0.24, drop, self.colour(120, 240))
                            if self.random.random() < 0.6:
                                shutter = self.colour(40, 150)
                                for a in (x - 0.45, x + width + 0.05):
                                    self.rectangle(draw, a, y + 0.7, 0.4, 1.7, shutter)
                            self.rectangle(draw, x + width / 2 - 0.05, y + 0.7, 0.1, 1.7, frame)
                            self.rectangle(draw, x - 0.15, y + 2.4, width + 0.3, 0.18, frame)
                self.rectangle(draw, 0, 0, w, 0.5, np.multiply(colour, 0.6))
                for x in self.random.uniform(0, w, 2):
                    self.rectangle(draw, x, 0, 0.18, h, (70, 70, 75))
            return self.draw(house, paint)
        return texture

    def paving(self, colour):
        """A paved ground with lawns and flower beds."""
        def texture(w, h):
            ground = self.plain(colour, 10, ((8, 8), (2, 2), (0.5, 0.5), (0.15, 0.15)))(w, h)
            step = max(2, round(1.2 * self.density))
            ground[::step] *= 0.8
            ground[:, ::step] *= 0.8

            def paint(draw):
                for _ in range(5):
                    x, y = self.random.uniform(0, w - 6), self.random.uniform(0, h - 6)
                    size = self.random.uniform(4, 9, 2)
                    green = np.array((80, 130, 60)) + self.random.normal(0, 12, 3)
                    box = [value * self.density for value in (x, y, x + size[0], y + size[1])]
                    draw.ellipse(box, fill=_ink(green), outline=(150, 140, 120), width=max(1, round(0.3 * self.density)))
                    for _ in range(40):
                        a, b = x + size[0] * self.random.uniform(0.2, 0.8), y + size[1] * self.random.uniform(0.2, 0.8)
                        self.rectangle(draw, a, b, 0.25, 0.25, self.colour(60, 250))
            return self.draw(ground, paint) + 6 * self.noise(ground.shape[:2], (0.1, 0.1))[..., None]
        return texture

    def sky(self, w, h):
        """Clouds on blue."""
        cover = sum(weight * self.noise((512, 512), (cell, cell)) for weight, cell in ((1, 60), (0.5, 25), (0.25, 8)))
        cover = (cover / 2).clip(0, 1)[..., None]
        return np.array((110, 160, 225)) * (1 - cover) + np.array((245, 245, 250)) * cover


def _ink(colour):
    return tuple(int(value) for value in np.clip(colour, 0, 255))


# --- Scenes -----------------------------------------------------------------------------------------------------------

class Scene:
    """What is seen: faces, and the boxes that occlude and that a camera keeps away from.

    cameras: the lowest and the highest (x, y, z) that cameras are at; targets: those that they look at.
    """

    def __init__(self, faces, boxes, cameras, targets):
        self.faces, self.boxes, self.cameras, self.targets = faces, boxes, cameras, targets

    def bake(self, lamps, ambient, reach, per_metre, ambient_rays):
        """Light the faces.

        lamps: (place, colour, fading distance in metres) each; the sun is one far away that does not fade.
        ambient: a colour, dimmed by the share of `ambient_rays` (directions N x 3, in a frame with the normal last) in which
        something is nearer than `reach` metres. per_metre: how many points a metre are lit.
        """
        for face in self.faces:
            grid = face.points(per_metre)
            points = grid.reshape(-1, 3) + 1e-3 * face.normal
            frame = np.stack((face.u / np.linalg.norm(face.u), face.v / np.linalg.norm(face.v), face.normal))
            blocked = [self._blocked(points, np.broadcast_to(ray, points.shape), reach) for ray in ambient_rays @ frame]
            light = (1 - np.mean(blocked, axis=0))[:, None] * np.asarray(ambient)
            for place, colour, fading in lamps:
                ways = place - points
                distances = np.linalg.norm(ways, axis=1)
                strength = (ways @ face.normal / distances).clip(min=0) / (1 + (distances / fading) ** 2)
                light = light + (strength * ~self._blocked(points, ways, 1))[:, None] * np.asarray(colour)
            face.light(light.reshape(grid.shape))

    def _blocked(self, points, directions, reach):
        blocked = np.zeros(len(points), bool)
        for box in self.boxes:
            blocked |= box.blocks(points, directions, reach)
        return blocked


def hemisphere(n):
    """n directions over a hemisphere about the last axis, denser towards it as the cosine: n x 3."""
    i = np.arange(n) + 0.5
    radius, angle = np.sqrt(i / n), np.pi * (1 + 5 ** 0.5) * i
    return np.stack((radius * np.cos(angle), radius * np.sin(angle), np.sqrt(1 - i / n)), axis=1)


def table_and_chairs(painter, random):
    """A table near the middle of a room, with things on it and two chairs: a list of (box, texture), its top first."""
    tone, (tw, td) = painter.timber(), random.uniform((1.2, 0.7), (1.6, 0.9))
    tx, ty, turn = random.uniform(-0.4, 0.4), random.uniform(-0.3, 0.3), random.uniform(-0.4, 0.4)
    table = Box((tx, ty, 0.72), (tw, td, 0.05), turn)
    furniture = [(table, painter.wood(tone))]

    def on_floor(a, b, z, size, yaw=0.0):
        """A box at (a, b) in the table's own axes."""
        at = table.centre + a * table.axes[0] + b * table.axes[1]
        return Box((at[0], at[1], z), size, turn + yaw)

    for a in (-1, 1):
        for b in (-1, 1):
            furniture.append((on_floor(a * (tw / 2 - 0.06), b * (td / 2 - 0.06), 0.35, (0.06, 0.06, 0.69)), painter.wood(tone)))
    for a, side in ((-0.35, -1), (0.35, 1)):  # chairs
        cloth, b = painter.plain(painter.colour(), 14), side * (td / 2 + 0.15)
        furniture += [(on_floor(a, b, 0.45, (0.42, 0.42, 0.06)), cloth), (on_floor(a, b, 0.21, (0.3, 0.3, 0.42)), painter.wood(tone)),
                      (on_floor(a, b + side * 0.2, 0.72, (0.42, 0.04, 0.5)), cloth)]
    for a in np.linspace(-0.38, 0.38, 4):
        size = random.uniform((0.1, 0.1, 0.03), (0.28, 0.2, 0.3))
        furniture.append((on_floor(a * tw, random.uniform(-0.2, 0.2) * td, 0.745 + size[2] / 2, size, random.uniform(-0.8, 0.8)),
                          painter.printed(painter.colour(40, 240))))
    return furniture


def make_room(random):
    """A furnished room of about 5 x 4 x 2.7 metres."""
    painter = Painter(random, density=150)
    w, d, h = random.uniform(4.6, 5.6), random.uniform(3.8, 4.6), random.uniform(2.5, 2.8)
    lamps = [(random.uniform(-0.3, 0.3) * w, random.uniform(-0.3, 0.3) * d) for _ in range(2)]
    x, y = np.eye(3)[:2]
    faces = [
        Face(np.array([0, 0, 0.0]), UP, y, (w, d), painter.planks(painter.timber(), rug=(2.4, 1.6))(w, d)),
        Face(np.array([0, 0, h]), -UP, y, (w, d), painter.ceiling(lamps)(w, d)),
    ]
    walls = [(np.array([0, d / 2, h / 2]), -y, w), (np.array([w / 2, 0, h / 2]), -x, d),
             (np.array([0, -d / 2, h / 2]), y, w), (np.array([-w / 2, 0, h / 2]), x, d)]
    boxes = []
    for i, (centre, normal, width) in enumerate(walls):
        faces.append(Face(centre, normal, UP, (width, h), painter.wall(painter.colour(140, 225, 0.7), window=i % 2 == 0, door=i == 3)(width, h)))
        boxes.append(Box(centre - 0.1 * normal, (0.2 + abs(normal[1]) * w, 0.2 + abs(normal[0]) * d, h)))

    def place(wall, along, size, base=0.0, turn=0.0, gap=0.0):
        """A box before a wall with its front to the room; along: -1 to 1."""
        centre, normal, width = walls[wall]
        sideways = np.cross(UP, normal)
        at = centre + normal * (size[1] / 2 + gap + 0.01) + sideways * along * (width - size[0]) / 2
        box = Box((at[0], at[1], base + size[2] / 2), size, np.arctan2(normal[0], -normal[1]) + turn)
        boxes.append(box)
        return box

    for wall in random.permutation(4)[:3]:  # tall things along three walls
        tone, size = painter.timber(), (random.uniform(0.9, 1.4), 0.32, random.uniform(1.6, 2.1))
        faces += place(wall, random.uniform(-0.9, 0.9), size).faces(painter.books(tone), painter.wood(tone))
    for wall in range(4):
        tone, size = painter.colour(90, 200, 0.8), (random.uniform(0.6, 1.1), 0.45, random.uniform(0.6, 0.9))
        along = random.uniform(-1, 1)
        faces += place(wall, along, size, gap=0.33).faces(
            painter.drawers(tone, random.integers(1, 3), random.integers(2, 4)), painter.wood(tone))
        small = random.uniform(0.15, 0.35, 3)
        faces += place(wall, along, small, base=size[2], turn=random.uniform(-0.6, 0.6), gap=0.4).faces(
            painter.printed(painter.colour()))
    for corner in range(3):  # cartons
        size = random.uniform(0.3, 0.5, 3)
        faces += place(corner, random.choice([-0.97, 0.97]), size, turn=random.uniform(-0.3, 0.3), gap=0.1).faces(
            painter.printed(painter.timber() * 1.2))

    furniture = table_and_chairs(painter, random)
    for box, texture in furniture:
        faces += box.faces(texture, bottom=box is furniture[0][0])  # the table's top
        boxes.append(box)

    scene = Scene(faces, boxes, cameras=((-w / 2 + 0.7, -d / 2 + 0.7, 1.15), (w / 2 - 1.9, d / 2 - 0.7, 1.8)),
                  targets=((w / 2, -0.5, 0.8), (w / 2, 0.5, 1.3)))
    scene.bake([(np.array([*lamp, h - 0.1]), (0.85, 0.81, 0.73), 2.2) for lamp in lamps], (0.5, 0.5, 0.53), reach=0.8,
               per_metre=12, ambient_rays=hemisphere(16))
    return scene


def make_yard(random):
    """A paved yard of about 34 x 26 metres between houses, with kiosks, hedges, benches and vans."""
    painter = Painter(random, density=24)
    w, d = random.uniform(30, 38), random.uniform(24, 30)
    x, y = np.eye(3)[:2]
    faces = [Face(np.zeros(3), UP, y, (w, d), painter.paving(painter.colour(140, 180, 0.3))(w, d))]
    sky = Face(np.array([0, 0, 120.0]), -UP, y, (3000, 3000), painter.sky(3000, 3000))
    boxes = []
    for normal, length, distance in ((-y, w, d / 2), (-x, d, w / 2), (y, w, d / 2), (x, d, w / 2)):
        start = -length / 2
        while start < length / 2:  # houses side by side
            width = min(random.uniform(7, 13), length / 2 - start)
            if length / 2 - start - width < 4:
                width = length / 2 - start
            height, depth = random.uniform(7, 14), 8.0
            middle = -normal * (distance + depth / 2) + np.cross(UP, normal) * (start + width / 2)
            house = Box((middle[0], middle[1], height / 2), (width, depth, height), np.arctan2(normal[0], -normal[1]))
            boxes.append(house)
            faces.append(Face(house.centre + normal * depth / 2, normal, UP, (width, height),
                              painter.facade(painter.colour(140, 225, 0.6))(width, height)))
            # The higher house shows its side above the lower one.
            faces += [Face(house.centre + side * house.axes[0] * width / 2, side * house.axes[0], UP, (depth, height),
                           painter.plain(painter.colour(120, 190, 0.5))(depth, height)) for side in (-1, 1)]
            start += width

    def stand(size, texture, side=None, top=None):
        """A box somewhere on the ground, away from the others."""
        while True:
            at, yaw = random.uniform((-w / 2 + 2, -d / 2 + 2), (w / 2 - 2, d / 2 - 2)), random.uniform(-0.5, 0.5)
            box = Box((*at, size[2] / 2), size, yaw)
            if all(np.linalg.norm(at - other.centre[:2]) > 3.2 for other in boxes) and np.abs(at / (w, d)).max() > 0.3:
                break
        boxes.append(box)
        faces.extend(box.faces(texture, side, top))

    for _ in range(3):
        stand((2.6, 2.2, 2.7), painter.facade(painter.colour(100, 230, 0.9), storey=2.7), top=painter.plain((120, 90, 80)))
    for _ in range(4):
        green = np.array((60, 105, 45)) + random.normal(0, 14, 3)
        stand((random.uniform(1.5, 4), 0.9, random.uniform(0.8, 1.3)), painter.plain(green, 16, ((0.5, 0.5), (0.1, 0.1), (0.05, 0.05))))
    for _ in range(4):
        tone = painter.colour(60, 230, 0.9)
        stand((4.4, 1.9, 2.0), painter.drawers(tone, 3, 2), painter.printed(tone), painter.plain(tone))
    for _ in range(4):
        stand((1.7, 0.5, 0.5), painter.wood(painter.timber()))
    for _ in range(3):
        stand((1.2, 1.2, random.uniform(2.6, 3.4)), painter.printed(painter.colour(60, 230)))

    scene = Scene(faces, boxes, cameras=((-0.4 * w, -0.35 * d, 1.4), (0.15 * w, 0.35 * d, 2.1)),
                  targets=((w / 2, -0.15 * d, 1.5), (w / 2, 0.15 * d, 4)))
    sun = np.array([5e4, -3.5e4, 8e4]), (0.85, 0.8, 0.7), np.inf
    scene.bake([sun], (0.72, 0.75, 0.82), reach=6, per_metre=2,
               ambient_rays=hemisphere(12))
    sky.light(np.ones((2, 2, 3)))
    scene.faces.append(sky)
    return scene


# --- Camera -----------------------------------------------------------------------------------------------------------

def camera_rotation(direction, roll=0.0):
    """Camera-to-world rotation, 3 x 3, of a camera that looks along a direction (3), turned about it by `roll` degrees."""
    forward = direction / np.linalg.norm(direction)
    right = np.cross(forward, UP) / np.linalg.norm(np.cross(forward, UP))
    down, roll = np.cross(forward, right), np.radians(roll)
    return np.stack((np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right, forward), axis=1)


def camera_path(scene, n_frames, random):
    """A smooth path: positions n x 3, and camera-to-world rotations n x 3 x 3. It keeps CLEARANCE metres away from what
    stands around. Raises UserError where it finds no way."""
    low, high = (np.concatenate((camera, target, [roll])) for camera, target, roll in zip(scene.cameras, scene.targets, (-4, 4)))
    for _ in range(MOST_TRIES):
        k = np.arange(1, 4)[:, None]
        frequencies, phases = k * random.uniform(0.6, 1.4, (3, 7)), random.uniform(0, 2 * np.pi, (3, 7))
        amplitudes = random.uniform(0.4, 1, (3, 7)) / k ** 0.5

        def waves(n):
            t = np.linspace(0, 2 * np.pi, n)[:, None, None]
            return (amplitudes * np.sin(frequencies * t + phases)).sum(axis=1)

        finely = waves(500)
        least, span = finely.min(axis=0), np.ptp(finely, axis=0)
        positions = (low + (finely - least) / span * (high - low))[:, :3]
        if min(box.distance(positions).min() for box in scene.boxes) > CLEARANCE:
            path = low + (waves(n_frames) - least) / span * (high - low)
            directions = path[:, 3:6] - path[:, :3]
            return path[:, :3], np.stack([camera_rotation(*view) for view in zip(directions, path[:, 6])])
    raise UserError("no free path for the camera in this scene; give another --seed")


def render(faces, position, rotation, width, height):
    """An image, height x width x 3 (uint8), of faces as the camera at `position` (3) with camera-to-world `rotation`
    (3 x 3) sees them."""
    focal = 585 / 640 * width
    columns = ((np.arange(width) + 0.5 - width / 2) / focal).astype(np.float32)
    rows = ((np.arange(height) + 0.5 - height / 2) / focal).astype(np.float32)
    nearness = np.zeros((height, width), np.float32)  # one over the depth
    seen = np.full((height, width), -1, np.int16)
    visible = []
    for face in faces:
        if (face.origin - position) @ face.normal >= 0:
            continue
        # A point of the face is origin + s u + t v, and depth times (column, row, 1) in camera axes: the inverse of [u v
        # origin] takes (column, row, 1) to (s, t, 1) over the depth, three functions that are linear in the image.
        edges = np.stack((face.u, face.v, face.origin - position), axis=1)
        camera = rotation.T @ edges
        window = _window(camera, columns, rows)
        if window is None:
            continue
        linear = np.linalg.inv(camera)
        s, t, n = ((a * columns[window[1]] + c) + (b * rows[window[0]])[:, None] for a, b, c in linear.astype(np.float32))
        inside = (n > nearness[window]) & (s >= 0) & (s <= n) & (t >= 0) & (t <= n)
        np.copyto(nearness[window], n, where=inside)
        np.copyto(seen[window], len(visible), where=inside)
        visible.append((face, window, s, t, abs(np.linalg.det(linear)) / focal ** 2))

    image = np.zeros((height, width, 3), np.uint8)
    for i, (face, window, s, t, area) in enumerate(visible):
        mine = seen[window] == i
        if mine.any():
            n = nearness[window][mine]
            # A pixel covers area / n^3 of the face's unit square: the texture's level has about as many texels.
            level = (0.5 * np.log2(area * face.shapes[0].prod() / n ** 3)).round().clip(0, len(face.shapes) - 1).astype(int)
            image[window][mine] = _texels(face, s[mine] / n, t[mine] / n, level)
    return image


def _window(camera, columns, rows):
    """The rows and columns of the image that a face can be seen in, or None. camera: u, v and origin in camera axes."""
    u, v, origin = camera.T
    corners = np.stack((origin, origin + u, origin + u + v, origin + v))
    if (corners[:, 2] < NEAR).any():  # cut at the near plane
        following = np.roll(corners, -1, axis=0)
        crossing = (corners[:, 2] < NEAR) != (following[:, 2] < NEAR)
        share = (NEAR - corners[crossing, 2]) / (following - corners)[crossing, 2]
        cuts = corners[crossing] + share[:, None] * (following - corners)[crossing]
        corners = np.concatenate((corners[corners[:, 2] >= NEAR], cuts))
        if not len(corners):
            return None
    x, y = (corners[:, :2] / corners[:, 2:]).T
    left, right = np.searchsorted(columns, (x.min(), x.max()))
    top, bottom = np.searchsorted(rows, (y.min(), y.max()))
    return None if left == right or top == bottom else (slice(top, bottom), slice(left, right))


def _texels(face, s, t, level):
    """Colours, N x 3, of places (s, t) from 0 to 1 on a face, interpolated between the four nearest texels of a level."""
    heights, widths = face.shapes[level].T.astype(np.float32)
    x, y = (s * widths - 0.5).clip(0, widths - 1), (t * heights - 0.5).clip(0, heights - 1)
    x0, y0 = x.astype(np.int32), y.astype(np.int32)
    step_x, step_y = (x0 < widths - 1), (y0 < heights - 1) * widths.astype(np.int32)
    start = face.starts[level] + y0 * widths.astype(np.int32) + x0
    x, y = (x - x0)[:, None], (y - y0)[:, None]
    upper = face.texels[start] * (1 - x) + face.texels[start + step_x] * x
    lower = face.texels[start + step_y] * (1 - x) + face.texels[start + step_y + step_x] * x
    return (upper * (1 - y) + lower * y + 0.5).astype(np.uint8)


# --- Files ------------------------------------------------------------------------------------------------------------

def train_and_test_paths(scene, n_frames, random):
    """Camera paths: TRAIN_SEQUENCES for training and one for testing, as camera_path gives them, and the median distance
    in metres of a test frame from the nearest training position. Every test frame is APART from every training frame."""
    train = [camera_path(scene, n_frames, random) for _ in range(TRAIN_SEQUENCES)]
    positions, rotations = (np.concatenate(parts) for parts in zip(*train))
    for _ in range(MOST_TRIES):
        test, nearest = camera_path(scene, n_frames, random), []
        for position, rotation in zip(*test):
            distances = np.linalg.norm(positions - position, axis=1)
            traces = np.einsum("aij,ij->a", rotations, rotation)
            angles = np.degrees(np.arccos(((traces - 1) / 2).clip(-1, 1)))
            if ((distances < APART[0]) & (angles < APART[1])).any():
                break
            nearest.append(distances.min())
        else:
            return [*train, test], np.median(nearest)
    raise UserError("no test path that keeps apart from the training paths; give fewer --frames or another --seed")


def write_scene(folder, scene, layout, n_frames, width, random):
    """Render a scene into a folder in the layout of a dataset: '7Scenes' or 'cambridge'. Returns the median distance in
    metres of a test frame from the nearest training position."""
    paths, distance = train_and_test_paths(scene, n_frames, random)
    frames = []  # (split, sequence's number, image's name, position, rotation)
    for i, path in enumerate(paths, start=1):
        for j, pose in enumerate(zip(*path)):
            name = f"seq-{i:02d}/frame-{j:06d}.color.png" if layout == "7Scenes" else f"seq{i}/frame{j + 1:05d}.png"
            frames.append(("train" if i <= TRAIN_SEQUENCES else "test", i, name, *pose))
    for _, _, name, position, rotation in tqdm(frames, desc=os.path.basename(folder), unit="frame", disable=None):
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        image = Image.fromarray(render(scene.faces, position, rotation, width, width * 3 // 4))
        image.save(os.path.join(folder, name), compress_level=1)
    (write_7scenes_poses if layout == "7Scenes" else write_cambridge_poses)(folder, frames)
    return distance


def write_7scenes_poses(folder, frames):
    """Camera-to-world matrices beside the images, and TrainSplit.txt and TestSplit.txt."""
    for _, _, name, position, rotation in frames:
        pose = np.block([[rotation, position[:, None]], [np.zeros(3), 1]])
        np.savetxt(os.path.join(folder, name.replace(".color.png", ".pose.txt")), pose, fmt="%.9e", delimiter="\t")
    for split in ("train", "test"):
        lines = dict.fromkeys(f"sequence{i}\n" for of, i, *_ in frames if of == split)
        with open(os.path.join(folder, f"{split.capitalize()}Split.txt"), "w") as file:
            file.writelines(lines)


def write_cambridge_poses(folder, frames):
    """dataset_train.txt and dataset_test.txt: an image a line, its camera's centre and world-to-camera quaternion."""
    for split in ("train", "test"):
        with open(os.path.join(folder, f"dataset_{split}.txt"), "w") as file:
            file.write("Synthetic scene\nImageFile, Camera Position [X Y Z W P Q R]\n\n")
            for of, _, name, position, rotation in frames:
                if of == split:
                    file.write(" ".join([name, *(f"{number:.9f}" for number in (*position, *mat2quat(rotation.T)))]) + "\n")


MAKERS = {"room": make_room, "yard": make_yard}


def main():
    parser = argparse.ArgumentParser(prog="python -m datasets.synthetic_scenes",
                                     description="Render textured 3-D scenes with exact poses, in the layout of a dataset.")
    parser.add_argument("folder", metavar="OUT", help="the folder to write the scenes to")
    parser.add_argument("--scenes", metavar="KIND", nargs="+", choices=MAKERS, default=["room", "yard"],
                        help="which scenes, of room and yard, called room-1, room-2, yard-1 ... (default: room yard)")
    parser.add_argument("--layout", choices=("7Scenes", "cambridge"), default="7Scenes", help="(default: 7Scenes)")
    parser.add_argument("--frames", metavar="N", type=int, default=120,
                        help=f"frames a sequence: {TRAIN_SEQUENCES} sequences for training, one for testing (default: 120)")
    parser.add_argument("--width", metavar="PIXELS", type=int, default=320, help="of an image, whose height is 3/4 (default: 320)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="other scenes and paths (default: 0)")
    args = parser.parse_args()
    for name, least in (("frames", 2), ("width", 32), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")

    names = [f"{kind}-{args.scenes[:i + 1].count(kind)}" for i, kind in enumerate(args.scenes)]
    for name in names:
        if os.path.exists(os.path.join(args.folder, name)):
            raise UserError(f"{os.path.join(args.folder, name)} is there already; remove it or name another folder")
    for i, (kind, name) in enumerate(zip(args.scenes, names)):
        folder = os.path.join(args.folder, name)
        random = np.random.default_rng((args.seed, i))
        try:
            shutil.rmtree(f"{folder}.part", ignore_errors=True)
            distance = write_scene(f"{folder}.part", MAKERS[kind](random), args.layout, args.frames, args.width, random)
            os.rename(f"{folder}.part", folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(f"{folder}.part", ignore_errors=True)
        print(f"{folder}: {TRAIN_SEQUENCES * args.frames} training and {args.frames} test frames, the test frames a median of "
              f"{distance:.2f} m from the nearest training position")


if __name__ == "__main__":
    from util import cli

    cli.run(main)
