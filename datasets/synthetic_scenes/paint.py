"""Textures for the surfaces of scenes."""
import numpy as np
from PIL import Image, ImageDraw


class Painter:
    """Makes textures that do not repeat.

    The methods named after a surface (`plain` to `paving`) return a function of (width, height) in metres that makes a
    texture, H x W x 3, as Box.faces takes them.
    """

    def __init__(self, random, density):
        """random: a NumPy generator. density: texels per metre."""
        self.random, self.density = random, density

    def noise(self, shape, cell):
        """Smooth noise, H x W, with a standard deviation of about 1. cell: its grain (height, width) in metres."""
        grid = [max(2, int(n / (c * self.density)) + 2) for n, c in zip(shape, cell, strict=True)]
        values = Image.fromarray(self.random.standard_normal(grid).astype(np.float32))
        return 1.5 * np.asarray(values.resize(shape[::-1], Image.Resampling.BICUBIC))

    def colour(self, low=60, high=230, saturation=1.2):
        """A random colour: 3 numbers."""
        colour = self.random.uniform(low, high, 3)
        return (colour.mean() + saturation * (colour - colour.mean())).clip(20, 245)

    def timber(self):
        """A random colour of wood: 3 numbers."""
        return np.array((165, 120, 80)) * self.random.uniform(0.55, 1.2) + self.random.normal(0, 10, 3)

    def draw(self, texture, paint):
        """A texture after `paint`, a function of an ImageDraw, has drawn on it."""
        image = Image.fromarray(texture.clip(0, 255).astype(np.uint8))
        paint(ImageDraw.Draw(image))
        return np.asarray(image).astype(float)

    def rectangle(self, draw, x, y, w, h, colour, outline=None, thickness=0.02):
        """Draw a rectangle, in metres from the top left corner. outline: the colour of a frame inside it, or None."""
        box = [x * self.density, y * self.density, max((x + w) * self.density - 1, x * self.density),
               max((y + h) * self.density - 1, y * self.density)]
        draw.rectangle(box, fill=_ink(colour), outline=outline if outline is None else _ink(outline),
                       width=max(1, round(thickness * self.density)))

    def picture(self, draw, x, y, w, h):
        """Draw a framed picture of random shapes, in metres from the top left corner."""
        edge = min(0.04, w / 8, h / 8)
        self.rectangle(draw, x, y, w, h, self.colour(), self.colour(20, 120), edge)
        for _ in range(self.random.integers(6, 14)):
            left, right = x + edge + np.sort(self.random.uniform(0, w - 2 * edge, 2))
            top, bottom = y + edge + np.sort(self.random.uniform(0, h - 2 * edge, 2))
            shape = self.random.choice([draw.rectangle, draw.ellipse])
            shape([value * self.density for value in (left, top, right, bottom)], fill=_ink(self.colour(20, 250)))

    def plain(self, colour, contrast=7, cells=((1, 1), (0.25, 0.25), (0.05, 0.05), (0.02, 0.02))):
        """A colour with noise of several grains."""
        def texture(w, h):
            shape = max(2, round(h * self.density)), max(2, round(w * self.density))
            return np.asarray(colour) + contrast * sum(self.noise(shape, cell) for cell in cells)[..., None]
        return texture

    def wood(self, colour, contrast=9):
        """Wood with its grain along the width."""
        return self.plain(colour, contrast, ((0.5, 0.5), (0.01, 0.4), (0.03, 1)))

    def wall(self, colour, window=False, door=False):
        """An inner wall with pictures, and a window and a door if asked for."""
        def texture(w, h):
            def paint(draw):
                self.rectangle(draw, 0, h - 0.1, w, 0.1, np.multiply(colour, 0.5))
                n = max(1, int(w))
                places = [(x, min(0.95, w / n * 0.8)) for x in (np.arange(n) + 0.1) * w / n]
                for i, (x, width) in enumerate(self.random.permutation(places)):
                    if door and i == 0:
                        self._room_door(draw, x, h)
                    elif window and i == 1:
                        self._room_window(draw, x, width)
                    else:
                        height = self.random.uniform(0.4, 0.9)
                        y, scale = self.random.uniform(0.35, 0.7), self.random.uniform(0.6, 1)
                        self.picture(draw, x, y, width * scale, height)
            return self.draw(self.plain(colour)(w, h), paint)
        return texture

    def _room_door(self, draw, x, h):
        self.rectangle(draw, x, h - 2.05, 0.9, 2.05, self.colour(50, 150), self.colour(30, 90), 0.06)
        for y in (h - 1.9, h - 0.95):
            self.rectangle(draw, x + 0.17, y, 0.56, 0.75, self.colour(70, 170), (60, 50, 40))
        self.rectangle(draw, x + 0.75, h - 1.05, 0.09, 0.03, (220, 200, 120))

    def _room_window(self, draw, x, width):
        self.rectangle(draw, x, 0.5, width, 1.2, (190, 215, 245), (240, 240, 235), 0.06)
        self.rectangle(draw, x + 0.06, 1.25, width - 0.12, 0.39, (90, 130, 80))
        self.rectangle(draw, x + width / 2 - 0.02, 0.5, 0.04, 1.2, (240, 240, 235))

    def planks(self, colour, rug=None):
        """A wooden floor. rug: (width, depth) in metres of a rug in its middle (default: none)."""
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
        """A ceiling with beams, and bright panels at `lamps`: (x, y) in metres from its centre."""
        def texture(w, h):
            def paint(draw):
                for x in np.arange(0.4, w, 0.9):
                    self.rectangle(draw, x, 0, 0.12, h, self.colour(110, 160))
                for x, y in lamps:
                    left, top = w / 2 - x - 0.3, h / 2 + y - 0.15
                    self.rectangle(draw, left, top, 0.6, 0.3, (255, 255, 245), (170, 170, 170), 0.03)
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
                        self.rectangle(draw, x + 0.02, y + 0.02, w / columns - 0.04, h / rows - 0.04, tone,
                                       np.multiply(colour, 0.5))
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
        """The front of a house: windows that differ, doors, shop signs, stains. storey: a storey's height in metres."""
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
                            self._shop(draw, x, y, width, storey, frame)
                        elif self.random.random() < 0.88:
                            self._house_window(draw, x, y, width, frame)
                self.rectangle(draw, 0, 0, w, 0.5, np.multiply(colour, 0.6))
                for x in self.random.uniform(0, w, 2):
                    self.rectangle(draw, x, 0, 0.18, h, (70, 70, 75))
            return self.draw(house, paint)
        return texture

    def _shop(self, draw, x, y, width, storey, frame):
        self.rectangle(draw, x, y + 0.6, width, storey - 0.6, self.colour(40, 160), frame, 0.15)
        self.rectangle(draw, x - 0.3, y + 0.15, width + 0.6, 0.6, self.colour(40, 240), (40, 40, 40), 0.05)
        for letter in np.arange(x - 0.1, x + width, 0.35)[:self.random.integers(2, 7)]:
            self.rectangle(draw, letter, y + 0.28, 0.2, 0.34, self.colour(20, 250))

    def _house_window(self, draw, x, y, width, frame):
        glass = np.array((70, 90, 120)) + self.random.normal(0, 25)
        self.rectangle(draw, x, y + 0.7, width, 1.7, glass, frame, 0.12)
        if self.random.random() < 0.5:  # a blind
            drop = self.random.uniform(0.3, 1.4)
            self.rectangle(draw, x + 0.12, y + 0.82, width - 0.24, drop, self.colour(120, 240))
        if self.random.random() < 0.6:
            shutter = self.colour(40, 150)
            for left in (x - 0.45, x + width + 0.05):
                self.rectangle(draw, left, y + 0.7, 0.4, 1.7, shutter)
        self.rectangle(draw, x + width / 2 - 0.05, y + 0.7, 0.1, 1.7, frame)
        self.rectangle(draw, x - 0.15, y + 2.4, width + 0.3, 0.18, frame)

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
                    edge = max(1, round(0.3 * self.density))
                    draw.ellipse(box, fill=_ink(green), outline=(150, 140, 120), width=edge)
                    for _ in range(40):
                        a, b = x + size[0] * self.random.uniform(0.2, 0.8), y + size[1] * self.random.uniform(0.2, 0.8)
                        self.rectangle(draw, a, b, 0.25, 0.25, self.colour(60, 250))
            return self.draw(ground, paint) + 6 * self.noise(ground.shape[:2], (0.1, 0.1))[..., None]
        return texture

    def sky(self):
        """The texture of a sky itself, 512 x 512 x 3: clouds on blue."""
        cover = sum(weight * self.noise((512, 512), (cell, cell)) for weight, cell in ((1, 60), (0.5, 25), (0.25, 8)))
        cover = (cover / 2).clip(0, 1)[..., None]
        return np.array((110, 160, 225)) * (1 - cover) + np.array((245, 245, 250)) * cover


def _ink(colour):
    """A colour as Pillow takes it."""
    return tuple(int(value) for value in np.clip(colour, 0, 255))
