"""Images as cameras and programs write them: orientation, numbers, compressions, and what is no image."""
import struct

import numpy as np
import pandas as pd
import pillow_heif
import pytest
import skimage.color
import skimage.io
import skimage.util
import tifffile
from conftest import ROOT, fails_here, run_here, write_labels, write_scene
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from walks import write_apr

from datasets import images, unlabelled
from datasets.camera_poses import CameraPoseDataset
from datasets.images import read_header, read_image
from datasets.unlabelled import Images
from util.errors import UserError

HEIGHT, WIDTH = 24, 32


@pytest.fixture
def pixels():
    """A smooth picture, which lossy formats keep, and no two of whose turns are alike."""
    row, column = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([row * 8, column * 6, (row + column) * 3], axis=2).astype(np.uint8)


def with_orientation(path, pixels, orientation):
    """Write pixels as they are, with an EXIF orientation."""
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
        return
    exif = Image.Exif()
    exif[274] = orientation
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}.get(path.suffix, {})
    Image.fromarray(pixels).save(path, exif=exif, **options)


# What a viewer shows of stored pixels, by the tag (EXIF 2.32, 4.6.4: the places of the stored row 0 and column 0).
SHOWN = {1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
         5: lambda p: p.transpose(1, 0, 2), 6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
         7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1], 8: lambda p: p.transpose(1, 0, 2)[::-1]}


@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_images_are_read_as_stored_or_turned_upright(tmp_path, pixels, extension, orientation):
    path = tmp_path / f"photo.{extension}"
    with_orientation(path, pixels, orientation)
    tolerance = 4 if extension == "jpg" else 0
    for upright, expected in ((False, pixels), (True, SHOWN[orientation](pixels))):
        seen = np.asarray(read_image(path, upright)).astype(int)
        assert seen.shape == expected.shape and np.abs(seen - expected).max() <= tolerance
    assert read_header(path) == (HEIGHT, WIDTH, orientation)


def test_the_orientation_of_a_png_is_found_behind_its_pixels_and_a_wrong_one_is_none(tmp_path, pixels):
    with_orientation(tmp_path / "before.png", pixels, 6)
    content = (tmp_path / "before.png").read_bytes()
    at = content.index(b"eXIf") - 4
    length = 12 + struct.unpack(">I", content[at:at + 4])[0]
    behind = content[:at] + content[at + length:-12] + content[at:at + length] + content[-12:]
    (tmp_path / "behind.png").write_bytes(behind)
    assert read_header(tmp_path / "behind.png") == (HEIGHT, WIDTH, 6)
    assert np.array_equal(read_image(tmp_path / "behind.png", upright=True), SHOWN[6](pixels))
    for wrong in (0, 9, 65535):
        with_orientation(tmp_path / "wrong.png", pixels, wrong)
        assert read_header(tmp_path / "wrong.png")[2] == 1
        assert np.array_equal(read_image(tmp_path / "wrong.png", upright=True), pixels)


GREY = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)


@pytest.mark.parametrize("numbers", [
    GREY / np.float32(255), GREY / np.float64(255), GREY.astype(np.float32), GREY.astype(np.float32) * 257,
    GREY.astype(np.float16) / 255, GREY.astype(np.int32), GREY.astype(np.uint32) * 257, GREY.astype(np.uint16) * 257,
], ids=lambda numbers: f"{numbers.dtype} to {numbers.max():g}")
@pytest.mark.parametrize("colour", [False, True])
def test_numbers_of_any_range_are_scaled_to_8_bits(tmp_path, numbers, colour):
    numbers = np.stack([numbers, numbers[::-1], numbers[:, ::-1]], axis=2) if colour else numbers
    expected = np.stack([GREY, GREY[::-1], GREY[:, ::-1]] if colour else [GREY] * 3, axis=2)
    tifffile.imwrite(tmp_path / "photo.tif", numbers, photometric="rgb" if colour else "minisblack")
    tolerance = numbers.dtype == np.float16
    assert np.abs(np.asarray(read_image(tmp_path / "photo.tif")).astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("numbers, words", [
    (GREY.astype(np.float32) - 1, "float32 numbers from -1 to 254"),
    (GREY * np.float32(1e6), "numbers from 0 to 2.55e+08"),
    (GREY * np.float32(1.0005 / 255), "numbers from 0 to 1.0005"),
    (GREY * np.float32(4), "numbers from 0 to 1020"),
    (np.where(GREY == 7, np.nan, GREY).astype(np.float32), "numbers from nan to nan"),
    (GREY.astype(np.int32) - 128, "int32 numbers from -128"),
])
def test_numbers_whose_range_does_not_tell_the_value_of_white_are_refused(tmp_path, numbers, words):
    tifffile.imwrite(tmp_path / "photo.tif", numbers)
    with pytest.raises(UserError, match="photo.tif cannot be read") as raised:
        read_image(tmp_path / "photo.tif")
    assert words in str(raised.value) and "save it with 8 or 16 bits" in str(raised.value)


def test_tiff_files_of_all_kinds_are_read(tmp_path, pixels):
    image = Image.fromarray(pixels)
    image.save(tmp_path / "lzw.tif", compression="tiff_lzw")
    image.save(tmp_path / "zstd.tif", compression="zstd")
    image.save(tmp_path / "lzw_turned.tif", compression="tiff_lzw", tiffinfo={274: 8})
    Image.fromarray(GREY / np.float32(255)).save(tmp_path / "lzw_float.tif", compression="tiff_lzw")
    image.quantize(256).save(tmp_path / "palette.tif")
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    image.save(tmp_path / "pages.tif", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))])
    tifffile.imwrite(tmp_path / "planes.tif", pixels.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    tifffile.imwrite(tmp_path / "white_is_0.tif", 255 - GREY, photometric="miniswhite")
    tifffile.imwrite(tmp_path / "alpha.tif", np.dstack((pixels, GREY)), photometric="rgb", extrasamples=["unassalpha"])
    grey = np.repeat(GREY[..., None], 3, axis=2)
    for name, expected, tolerance in (("lzw", pixels, 0), ("zstd", pixels, 0), ("lzw_turned", pixels, 0),
                                      ("lzw_float", grey, 0), ("palette", pixels, 24), ("cmyk", pixels, 1),
                                      ("pages", pixels, 0), ("planes", pixels, 0), ("white_is_0", grey, 0),
                                      ("alpha", pixels, 0)):
        seen = np.asarray(read_image(tmp_path / f"{name}.tif")).astype(int)
        assert seen.shape == expected.shape and np.abs(seen - expected).max() <= tolerance, name
        assert read_header(tmp_path / f"{name}.tif")[:2] == (HEIGHT, WIDTH), name
    assert np.array_equal(read_image(tmp_path / "lzw_turned.tif", upright=True), SHOWN[8](pixels))


def test_ordinary_images_are_read_as_scikit_image_reads_them(tmp_path, pixels):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8))
    sixteen = GREY.astype(np.uint16) * 257
    for name, picture in {"rgb.jpg": image, "grey.jpg": image.convert("L"), "rgb.png": image, "rgb.webp": image,
                          "grey.png": image.convert("L"), "bits.png": image.convert("1"), "rgb.bmp": image,
                          "rgba.png": image.convert("RGBA"), "16.png": Image.fromarray(sixteen), "rgb.ppm": image,
                          "rgb.tif": image, "16.tif": Image.fromarray(sixteen)}.items():
        picture.save(tmp_path / name)
        published = skimage.util.img_as_ubyte(skimage.io.imread(tmp_path / name))
        published = published if published.ndim == 3 else skimage.color.gray2rgb(published)
        assert np.array_equal(read_image(tmp_path / name), published[..., :3]), name


def test_a_dark_16_bit_pgm_stays_dark(tmp_path):
    (tmp_path / "dark.pgm").write_bytes(b"P5 32 24 65535\n" + (GREY.astype(">u2")).tobytes())
    assert np.array_equal(np.asarray(read_image(tmp_path / "dark.pgm"))[..., 0], np.round(GREY / 257))


@pytest.mark.parametrize("extension", ["heic", "avif"])
def test_phones_formats_are_read_and_turned(tmp_path, pixels, extension):
    path = tmp_path / f"photo.{extension}"
    pixels = np.kron(pixels, np.ones((4, 4, 1), np.uint8))  # of a size that the format's blocks leave smooth
    pillow_heif.register_heif_opener()
    for orientation, shown in SHOWN.items():
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(pixels).save(path, exif=exif.tobytes(), quality=95)
        assert np.abs(np.asarray(read_image(path, upright=True)).astype(int) - shown(pixels)).max() <= 8
        # HEIC has the turn in itself: no program shows it as stored.
        stored = shown(pixels) if extension == "heic" else pixels
        assert np.abs(np.asarray(read_image(path)).astype(int) - stored).max() <= 8
        assert read_header(path)[:2] == stored.shape[:2]
    assert f".{extension}" in images.IMAGE_EXTENSIONS


def test_the_content_of_a_file_tells_what_it_is_not_its_name(tmp_path, pixels):
    for name, other in (("a.tif", "a.jpg"), ("b.jpg", "b.tif"), ("c.png", "c.tif")):
        with_orientation(tmp_path / name, pixels, 6)
        (tmp_path / name).rename(tmp_path / other)
        assert read_header(tmp_path / other) == (HEIGHT, WIDTH, 6)
        for upright, expected in ((False, pixels), (True, SHOWN[6](pixels))):
            assert np.abs(np.asarray(read_image(tmp_path / other, upright)).astype(int) - expected).max() <= 4, other


def test_an_orientation_in_the_xmp_of_a_png_is_found(tmp_path, pixels):
    xmp = PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    Image.fromarray(pixels).save(tmp_path / "photo.png", pnginfo=xmp)
    assert read_header(tmp_path / "photo.png") == (HEIGHT, WIDTH, 6)


@pytest.fixture(scope="module")
def apr(tmp_path_factory):
    """An APR's weights."""
    path = tmp_path_factory.mktemp("apr") / "apr.pth"
    write_apr(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures and of other files."""
    folder = tmp_path / "photos"
    write_scene(tmp_path, "attic", 3, "test")
    (tmp_path / "attic/seq-test").rename(folder)
    return folder


def predict(apr, images, *more):
    return ["main.py", "posenet", "predict", "none", images, "-", ROOT / "config.json", "--checkpoint_path", apr,
            "--predictions_path", apr.parent / "poses.csv", "--output_dir", apr.parent / "out", *more,
            "--set", "backbone_type=mobilenet", "hidden_dim=16", "n_workers=0"]


def poses(apr):
    return pd.read_csv(apr.parent / "poses.csv", index_col="img_path")


@pytest.mark.parametrize("cached", [False, True])
def test_predict_turns_phone_photos_upright_unless_asked_not_to(apr, photos, tmp_path, cached):
    more = ["--cache_dir", tmp_path / "cache"] if cached else []
    output = run_here(*predict(apr, photos, *more))
    assert "EXIF orientation" not in output
    upright = poses(apr)
    for path in photos.iterdir():
        picture = Image.open(path).convert("RGB")
        exif = Image.Exif()
        exif[274] = 6
        stored = picture.transpose(Image.Transpose.ROTATE_90)
        if "000002" not in path.name:
            stored.save(path, exif=exif)
            assert np.array_equal(ImageOps.exif_transpose(Image.open(path)), picture)
    output = run_here(*predict(apr, photos, *more))
    turned = "EXIF orientation: 2 of 3 images have one, and are turned upright (--as_stored leaves them as stored)\n"
    assert turned in output
    assert np.allclose(poses(apr), upright, atol=1e-6)
    run_here(*predict(apr, photos, "--as_stored", *more))
    as_stored = poses(apr)
    same = np.isclose(as_stored, upright, atol=1e-4).all(axis=1)
    assert same.tolist() == [False, False, True]
    # With labels the pixels stay as stored, and the log says so.
    labels = write_labels(tmp_path / "labels.csv", [f"a,test,s,photos/{name},1,2,3,1,0,0,0" for name in upright.index])
    listed = predict(apr, photos)
    listed[2:6] = ["test", "none", tmp_path, labels]
    output = run_here(*listed)
    assert "EXIF orientation: 2 of 3 images have one, and are taken as stored, as their labels are\n" in output
    assert np.allclose(pd.read_csv(apr.parent / "poses.csv").loc[:, "t1":"q4"], as_stored, atol=1e-5)
    listed.insert(7, "--as_stored")
    assert "--as_stored is for predict" in fails_here(*listed)[1]


def test_a_cache_of_labelled_frames_has_their_stored_shapes(tmp_path, pixels):
    for i, orientation in enumerate((1, 6)):
        with_orientation(tmp_path / f"{i}.jpg", pixels, orientation)
    rows = [f"a,train,s,{i}.jpg,1,2,3,1,0,0,0" for i in range(2)]
    dataset = CameraPoseDataset(tmp_path, write_labels(tmp_path / "labels.csv", rows))
    dataset.cache_frames()
    assert [dataset.cache[i].shape for i in range(2)] == [(256, 341, 3)] * 2


def test_predict_counts_what_it_leaves_out(apr, photos, monkeypatch):
    for name in ("IMG_1.HEIC", "IMG_2.MOV", "IMG_3.mov", "notes"):
        (photos / name).write_bytes(b"x")
    monkeypatch.setattr(unlabelled, "IMAGE_EXTENSIONS", (".png",))  # as without pillow-heif
    monkeypatch.setattr(unlabelled, "HEIF_ADVICE", " (pip install pillow-heif reads them)")
    output = run_here(*predict(apr, photos))
    (photos / ".hidden.png").touch()
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    output = run_here(*predict(apr, photos))
    assert (f"Left out of {photos}: 1 .heic (pip install pillow-heif reads them), 2 .mov, 1 broken link, 1 hidden, "
            "1 no extension; a folder is searched for .png\n") in output
    assert len(poses(apr)) == 3
    for path in photos.glob("*.png"):
        path.unlink()
    status, said = fails_here(*predict(apr, photos))
    assert status == 2 and f"{photos}: no image, but 1 .heic (pip install" in said


@pytest.mark.parametrize("cached", [False, True])
def test_bad_images_among_many_are_named_and_the_others_predicted(apr, photos, tmp_path, cached):
    more = ["--cache_dir", tmp_path / "cache"] if cached else []
    run_here(*predict(apr, photos))
    expected = poses(apr)
    for i in range(6):
        (photos / f"bad{i}.png").write_bytes((photos / "frame-000001.color.png").read_bytes()[:500])
    for _ in range(2):  # the second time from the cache
        (apr.parent / "poses.csv").unlink()
        status, said = fails_here(*predict(apr, photos, *more))
        assert status == 2 and "6 problems: image " in said and "bad4.png cannot be read" in said
        assert "; and 1 more; " in said
        assert said.endswith("poses.csv has the poses of the other images") and "bad5.png" not in said
        assert np.allclose(poses(apr), expected, atol=1e-6) and poses(apr).index.equals(expected.index)
    for path in photos.glob("frame*"):
        path.unlink()
    (apr.parent / "poses.csv").unlink()
    status, said = fails_here(*predict(apr, photos, *more))
    assert status == 2 and "6 problems: " in said and not (apr.parent / "poses.csv").exists()


def test_a_path_that_exists_is_that_path_whatever_its_letters(photos, tmp_path):
    folder = tmp_path / "walk [2024]*"
    photos.rename(folder)
    (tmp_path / "walk 2x").mkdir()
    (folder / "a[0].png").write_bytes((folder / "frame-000000.color.png").read_bytes())
    for given, names in ((folder, ["a[0].png", *(f"frame-{i:06d}.color.png" for i in range(3))]),
                         (folder / "a[0].png", ["a[0].png"]),
                         (f"{folder}/f*[12].color.png", [f"frame-{i:06d}.color.png" for i in (1, 2)])):
        assert Images(str(given)).names == names
    with pytest.raises(UserError, match=r"no image; .*\[ \] in it stand for one of the characters between them"):
        Images(f"{folder}/a[0]?.png")


@pytest.mark.parametrize("mode, more", [("train", []), ("test", ["n_workers=1"]), ("test", [])])
def test_labelled_frames_that_cannot_be_read_are_counted_and_five_named(apr, photos, tmp_path, mode, more):
    names = [path.name for path in sorted(photos.iterdir())]
    for i in range(7):
        (photos / f"bad{i}.png").write_bytes((photos / names[0]).read_bytes()[:500])
    listed_names = [names[0], *(f"bad{i}.png" for i in range(7)), names[1]]
    rows = [f"a,{mode},s,photos/{name},{i},2,3,1,0,0,0" for i, name in enumerate(listed_names)]
    labels = write_labels(tmp_path / "labels.csv", rows)
    listed = predict(apr, photos)
    listed[2:6] = [mode, "none", tmp_path, labels]
    if mode == "train":
        at = listed.index("--predictions_path")
        del listed[at:at + 2]
    status, said = fails_here(*listed, *more)
    assert status == 2 and f"error: 7 problems: {labels}: row 3: image {photos}/bad0.png cannot be read" in said
    assert f"{labels}: row 7: image {photos}/bad4.png" in said and "bad5" not in said and said.endswith("and 2 more")
    for path in photos.glob("bad*"):
        path.unlink()
    status, said = fails_here(*listed, *more)
    problems = f"error: {labels}: 7 problems: row 3: image {photos}/bad0.png does not exist; row 4: "
    assert status == 2 and problems in said
    write_labels(labels, [row.replace(",2,3,", ",two,3,") for row in rows])
    status, said = fails_here(*listed, *more)
    assert status == 2 and f"error: {labels}: 9 problems: row 2: t2 'two' is not a finite number; row 3: " in said
