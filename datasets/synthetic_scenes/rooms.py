"""The kinds of scenes: a furnished room, one whose test walk leaves its trained part, and a yard between houses."""
import numpy as np

from datasets.synthetic_scenes.paint import Painter
from datasets.synthetic_scenes.surfaces import UP, Box, Face, Scene, hemisphere

X, Y = np.eye(3)[:2]


def make_room(random):
    """A furnished room of about 5 x 4 x 2.7 metres."""
    painter = Painter(random, density=150)
    w, d, h = random.uniform(4.6, 5.6), random.uniform(3.8, 4.6), random.uniform(2.5, 2.8)
    lamps = [(random.uniform(-0.3, 0.3) * w, random.uniform(-0.3, 0.3) * d) for _ in range(2)]
    faces = [
        Face(np.array([0, 0, 0.0]), UP, Y, (w, d), painter.planks(painter.timber(), rug=(2.4, 1.6))(w, d)),
        Face(np.array([0, 0, h]), -UP, Y, (w, d), painter.ceiling(lamps)(w, d)),
    ]
    walls = [(np.array([0, d / 2, h / 2]), -Y, w), (np.array([w / 2, 0, h / 2]), -X, d),
             (np.array([0, -d / 2, h / 2]), Y, w), (np.array([-w / 2, 0, h / 2]), X, d)]
    boxes = []
    for i, (centre, normal, width) in enumerate(walls):
        paint = painter.wall(painter.colour(140, 225, 0.7), window=i % 2 == 0, door=i == 3)
        faces.append(Face(centre, normal, UP, (width, h), paint(width, h)))
        boxes.append(Box(centre - 0.1 * normal, (0.2 + abs(normal[1]) * w, 0.2 + abs(normal[0]) * d, h)))
    for box, box_faces in _wall_furniture(painter, random, walls):
        boxes.append(box)
        faces += box_faces
    furniture = _table_and_chairs(painter, random)
    for i, (box, texture) in enumerate(furniture):
        boxes.append(box)
        faces += box.faces(texture, bottom=i == 0)  # of the table top

    scene = Scene(faces, boxes, cameras=((-w / 2 + 0.7, -d / 2 + 0.7, 1.15), (w / 2 - 1.9, d / 2 - 0.7, 1.8)),
                  targets=((w / 2, -0.5, 0.8), (w / 2, 0.5, 1.3)))
    scene.bake([(np.array([*lamp, h - 0.1]), (0.85, 0.81, 0.73), 2.2) for lamp in lamps], (0.5, 0.5, 0.53), reach=0.8,
               per_metre=12, ambient_rays=hemisphere(16))
    return scene


def make_excursion(random):
    """A room whose test walk leaves the part that the training walks see, for half of the time."""
    scene = make_room(random)
    scene.excursion = 0.9, 120
    return scene


def _wall_furniture(painter, random, walls):
    """Shelves, chests with small things on them, and cartons along the walls: a list of (box, its faces).

    walls: (centre, normal, width) each.
    """
    furniture = []

    def place(wall, along, size, textures, base=0.0, turn=0.0, gap=0.0):
        """Put a box before a wall with its front to the room; along: -1 to 1."""
        centre, normal, width = walls[wall]
        sideways = np.cross(UP, normal)
        x, y, _ = centre + normal * (size[1] / 2 + gap + 0.01) + sideways * along * (width - size[0]) / 2
        box = Box((x, y, base + size[2] / 2), size, np.arctan2(normal[0], -normal[1]) + turn)
        furniture.append((box, box.faces(*textures)))

    for wall in random.permutation(4)[:3]:
        tone, size = painter.timber(), (random.uniform(0.9, 1.4), 0.32, random.uniform(1.6, 2.1))
        place(wall, random.uniform(-0.9, 0.9), size, (painter.books(tone), painter.wood(tone)))
    for wall in range(4):
        tone, size = painter.colour(90, 200, 0.8), (random.uniform(0.6, 1.1), 0.45, random.uniform(0.6, 0.9))
        along = random.uniform(-1, 1)
        chest = painter.drawers(tone, random.integers(1, 3), random.integers(2, 4))
        place(wall, along, size, (chest, painter.wood(tone)), gap=0.33)
        small, turn = random.uniform(0.15, 0.35, 3), random.uniform(-0.6, 0.6)
        place(wall, along, small, (painter.printed(painter.colour()),), base=size[2], turn=turn, gap=0.4)
    for wall in range(3):
        size = random.uniform(0.3, 0.5, 3)
        along, turn = random.choice([-0.97, 0.97]), random.uniform(-0.3, 0.3)
        place(wall, along, size, (painter.printed(painter.timber() * 1.2),), turn=turn, gap=0.1)
    return furniture


def _table_and_chairs(painter, random):
    """A table near the middle of a room, things on it, two chairs: a list of (box, texture), the table top first."""
    tone, (tw, td) = painter.timber(), random.uniform((1.2, 0.7), (1.6, 0.9))
    tx, ty, turn = random.uniform(-0.4, 0.4), random.uniform(-0.3, 0.3), random.uniform(-0.4, 0.4)
    table = Box((tx, ty, 0.72), (tw, td, 0.05), turn)
    furniture = [(table, painter.wood(tone))]

    def on_floor(a, b, z, size, yaw=0.0):
        """A box at (a, b) in the table's own axes."""
        x, y, _ = table.centre + a * table.axes[0] + b * table.axes[1]
        return Box((x, y, z), size, turn + yaw)

    for a in (-1, 1):
        for b in (-1, 1):
            leg = on_floor(a * (tw / 2 - 0.06), b * (td / 2 - 0.06), 0.35, (0.06, 0.06, 0.69))
            furniture.append((leg, painter.wood(tone)))
    for a, side in ((-0.35, -1), (0.35, 1)):  # chairs: seat, foot, back
        cloth, b = painter.plain(painter.colour(), 14), side * (td / 2 + 0.15)
        furniture += [(on_floor(a, b, 0.45, (0.42, 0.42, 0.06)), cloth),
                      (on_floor(a, b, 0.21, (0.3, 0.3, 0.42)), painter.wood(tone)),
                      (on_floor(a, b + side * 0.2, 0.72, (0.42, 0.04, 0.5)), cloth)]
    for a in np.linspace(-0.38, 0.38, 4):
        size = random.uniform((0.1, 0.1, 0.03), (0.28, 0.2, 0.3))
        b, yaw = random.uniform(-0.2, 0.2) * td, random.uniform(-0.8, 0.8)
        thing = on_floor(a * tw, b, 0.745 + size[2] / 2, size, yaw)
        furniture.append((thing, painter.printed(painter.colour(40, 240))))
    return furniture


def make_yard(random):
    """A paved yard of about 34 x 26 metres between houses, with kiosks, hedges, benches and vans."""
    painter = Painter(random, density=24)
    w, d = random.uniform(30, 38), random.uniform(24, 30)
    faces = [Face(np.zeros(3), UP, Y, (w, d), painter.paving(painter.colour(140, 180, 0.3))(w, d))]
    sky = Face(np.array([0, 0, 120.0]), -UP, Y, (3000, 3000), painter.sky())
    boxes = []
    houses = _houses(painter, random, w, d)
    for box, box_faces in houses + _yard_furniture(painter, random, w, d, [box for box, _ in houses]):
        boxes.append(box)
        faces += box_faces

    scene = Scene(faces, boxes, cameras=((-0.4 * w, -0.35 * d, 1.4), (0.15 * w, 0.35 * d, 2.1)),
                  targets=((w / 2, -0.15 * d, 1.5), (w / 2, 0.15 * d, 4)))
    sun = np.array([5e4, -3.5e4, 8e4]), (0.85, 0.8, 0.7), np.inf
    scene.bake([sun], (0.72, 0.75, 0.82), reach=6, per_metre=2, ambient_rays=hemisphere(12))
    sky.light(np.ones((2, 2, 3)))
    scene.faces.append(sky)
    return scene


def _houses(painter, random, w, d):
    """Houses side by side around a yard of w x d metres: a list of (box, its visible faces)."""
    houses = []
    for normal, length, distance in ((-Y, w, d / 2), (-X, d, w / 2), (Y, w, d / 2), (X, d, w / 2)):
        start = -length / 2
        while start < length / 2:
            width = min(random.uniform(7, 13), length / 2 - start)
            if length / 2 - start - width < 4:
                width = length / 2 - start
            height, depth = random.uniform(7, 14), 8.0
            x, y, _ = -normal * (distance + depth / 2) + np.cross(UP, normal) * (start + width / 2)
            house = Box((x, y, height / 2), (width, depth, height), np.arctan2(normal[0], -normal[1]))
            front = painter.facade(painter.colour(140, 225, 0.6))
            faces = [Face(house.centre + normal * depth / 2, normal, UP, (width, height), front(width, height))]
            for side in (-1, 1):  # visible above a lower neighbour
                outwards, texture = side * house.axes[0], painter.plain(painter.colour(120, 190, 0.5))
                centre = house.centre + outwards * width / 2
                faces.append(Face(centre, outwards, UP, (depth, height), texture(depth, height)))
            houses.append((house, faces))
            start += width
    return houses


def _yard_furniture(painter, random, w, d, houses):
    """Kiosks, hedges, vans, benches and columns in a yard of w x d metres: a list of (box, its faces).

    houses: the boxes around the yard.
    """
    furniture = []

    def stand(size, texture, side=None, top=None):
        """Put a box somewhere on the ground, away from the others."""
        while True:
            at, yaw = random.uniform((-w / 2 + 2, -d / 2 + 2), (w / 2 - 2, d / 2 - 2)), random.uniform(-0.5, 0.5)
            box = Box((*at, size[2] / 2), size, yaw)
            others = houses + [other for other, _ in furniture]
            if all(np.linalg.norm(at - other.centre[:2]) > 3.2 for other in others) and np.abs(at / (w, d)).max() > 0.3:
                break
        furniture.append((box, box.faces(texture, side, top)))

    for _ in range(3):
        kiosk = painter.facade(painter.colour(100, 230, 0.9), storey=2.7)
        stand((2.6, 2.2, 2.7), kiosk, top=painter.plain((120, 90, 80)))
    for _ in range(4):
        green = np.array((60, 105, 45)) + random.normal(0, 14, 3)
        size = random.uniform(1.5, 4), 0.9, random.uniform(0.8, 1.3)
        stand(size, painter.plain(green, 16, ((0.5, 0.5), (0.1, 0.1), (0.05, 0.05))))
    for _ in range(4):
        tone = painter.colour(60, 230, 0.9)
        stand((4.4, 1.9, 2.0), painter.drawers(tone, 3, 2), painter.printed(tone), painter.plain(tone))
    for _ in range(4):
        stand((1.7, 0.5, 0.5), painter.wood(painter.timber()))
    for _ in range(3):
        stand((1.2, 1.2, random.uniform(2.6, 3.4)), painter.printed(painter.colour(60, 230)))
    return furniture
