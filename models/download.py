"""Download the published weights, under the names that the example commands use.

    python -m models.download [NAME ...] [--to weights]
"""
import argparse
import os

from models.checkpoints import describe, read_weights
from util import cli
from util.errors import UserError
from util.files import sha256, whole_file, writing

PAGE = "https://drive.google.com/file/d/{}/view"
APR, PAE, POSENET, POSENET_PAE = "ems-transposenet", "multi-scene PAE", "posenet", "single-scene PAE"
# What each file holds, and its id on the drive. The iAPR of 50 % is not published: its page repeats the 100 % one's.
FILES = {
    "posenet_mobilenet_kingscollege": (POSENET, "1YMbWCCnu1pQI-ni4v0y_Lo8EpFumwqHI"),
    "pae_posenet_mobilenet_kingscollege": (POSENET_PAE, "1EhGmMMCOlFK3lirYlintw0DEJtRGr3eR"),
    "posenet_resnet50_kingscollege": (POSENET, "1afA97MG5tGfFLBTwaAbauT2-H0tFJxaj"),
    "pae_posenet_resnet50_kingscollege": (POSENET_PAE, "1nZolEHF_TKDHpBEw7YQhxH4w61HL0oGD"),
    "posenet_efficientnet_kingscollege": (POSENET, "1FdaAFfDtN-XxWl3Ek281Ca_wlerqnBOF"),
    "pae_posenet_efficientnet_kingscollege": (POSENET_PAE, "1zvHBt5bGB2v59_ONWwLmh8NNUNVdh03T"),
    "ms_transformer_cambridge": (APR, "1ZEIKQSbZmkSnJwETjACvMbs5OeCn7f3q"),
    "pae_ms_transformer_cambridge": (PAE, "1rshdruRQcZYMIRI9lTY_U981cJsohauI"),
    "ms_transformer_7scenes": (APR, "1Ryn5oQ0zRV_3KVORzMAk99cP0fY2ff85"),
    "pae_ms_transformer_7scenes": (PAE, "1hGcII8D0G24DBGXh3aLohCubAmfN9Rc7"),
    "iapr_7scenes": ("iAPR", "1VrFBHfx8eJP3KOrV0c61WWCiS8zpV3SZ"),
    "iapr_7scenes_70": ("iAPR", "1gtDRDhn9SPeOkJmSEKOdTaTV8n5zeLl-"),
    "iapr_7scenes_30": ("iAPR", "1Mk96h4TgxdXUCo9d2-nqRmuCNh7hdhF2"),
    "ms_transformer_7scenes_70": (APR, "134Xp_76gU8hoHV1CUW_kWT4D6M2moRkl"),
    "ms_transformer_7scenes_50": (APR, "1cuaLkTYh2XYnZwlCEsuRC-7UVyRid_6a"),
    "ms_transformer_7scenes_30": (APR, "1ApbfmkqMryLuxbX_n1ZLbD9MhfJBGBT2"),
    "pae_ms_transformer_7scenes_70": (PAE, "1_OwVKwpoR5CbTtTHHmaHqzLAR7a4QvCF"),
    "pae_ms_transformer_7scenes_50": (PAE, "1W_mNFuwAAVInKvYtzQX2g_hbDCbxcb3W"),
    "pae_ms_transformer_7scenes_30": (PAE, "1cHmdHGGQtQm1O4rezLZuAxOlZK8aeWg1"),
}


class BrokenOff(UserError):
    """A download that another run may complete; other files would fare no better now."""


def download(name, folder, sums):
    """Download a file of FILES to FOLDER/NAME.pth unless it is there, check it, and add its SHA-256 to sums.

    Until it is complete it is a file of the same name with .part in it, which a later run resumes. sums: {file name:
    SHA-256}, of an earlier run.

    Raises UserError where the drive gives no file, and for a file that is not what it should be.
    """
    kind, drive_id = FILES[name]
    path = os.path.join(folder, f"{name}.pth")
    page = PAGE.format(drive_id)
    found = None
    if not os.path.exists(path):
        part = f"{path}.part"
        fetch(drive_id, part, f"{path}: {{}}: open {page} in a browser, and save the file as {path}")
        found = check(part, kind, page)
        os.replace(part, path)
    digest = sha256(path)
    if sums.get(f"{name}.pth", digest) != digest:
        raise UserError(f"{path}: its SHA-256 is {digest}, but SHA256SUMS has {sums[f'{name}.pth']}: it has changed; "
                        "remove it to download it again")
    found = found or check(path, kind, page)
    sums[f"{name}.pth"] = digest
    sizes = ", ".join(f"{key} {value}" for key, value in found.items() if key in ("num_scenes", "hidden_dim"))
    print(f"{path}: {kind} ({sizes}), SHA-256 {digest}", flush=True)


def fetch(drive_id, part, failed):
    """Download a file of the drive to `part`, which an earlier run may have begun. failed: a message with {}."""
    import gdown
    import requests
    from gdown.exceptions import DownloadError, FileURLRetrievalError

    try:
        with writing(part):
            os.makedirs(os.path.dirname(os.path.abspath(part)), exist_ok=True)
            found = gdown.download(id=drive_id, output=part, resume=True, use_cookies=False, retries=3, timeout=60)
    except FileURLRetrievalError as error:
        raise UserError(failed.format("the drive gives a web page, no file (its quota may be used up: "
                                      f"{' '.join(str(error).split())[:120]})")) from error
    except (DownloadError, requests.RequestException) as error:
        raise BrokenOff(failed.format(f"the download failed ({' '.join(str(error).split())[:120]}); run again to "
                                      "resume it, or else")) from error
    if not found or not os.path.exists(part):
        raise UserError(failed.format("the drive gives no file"))


def check(path, kind, page):
    """Return what a file's tensors determine, as `describe`. Raises UserError unless it holds weights of a kind.

    A web page is told from a checkpoint. A wrong .part is removed.
    """
    with open(path, "rb") as file:
        begin = file.read(512).lstrip().lower()
    problem = None
    if begin.startswith((b"<!doctype html", b"<html")):
        problem = f"a web page, not weights: open {page} in a browser, and save the file"
    else:
        try:
            found = describe(read_weights(path))
        except UserError as error:
            problem = str(error).removeprefix(f"{path}: ")
        else:
            if found.get("kind") != kind:
                problem = f"holds {found.get('kind', 'weights of no model known here')}, but {kind} was expected"
    if problem:
        if path.endswith(".part"):
            os.remove(path)
        raise UserError(f"{path.removesuffix('.part')}: {problem}")
    return found


def read_sums(path):
    """{file name: SHA-256} of a file as sha256sum writes it, {} where there is none."""
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        lines = [line.split() for line in file if line.strip()]
    if any(len(line) != 2 for line in lines):
        raise UserError(f"{path}: not lines of a SHA-256 and a file's name; remove it to write it anew")
    return {name: digest for digest, name in lines}


def main():
    """Download the files that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m models.download", description="Download the published weights.")
    parser.add_argument("names", metavar="NAME", nargs="*",
                        help=f"(default: all) {' '.join(FILES)}")
    parser.add_argument("--to", metavar="DIR", default="weights", help="(default: weights)")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in FILES]
    if unknown:
        raise UserError(f"{unknown[0]} is not among the published weights: {', '.join(FILES)}")
    download_all(args.names or list(FILES), args.to)


def download_all(names, folder):
    """Download files of FILES, and note their SHA-256. Raises UserError, after the last, where some are missing."""
    sums_file = os.path.join(folder, "SHA256SUMS")
    sums, problems = read_sums(sums_file), []
    for name in names:
        try:
            download(name, folder, sums)
        except BrokenOff:
            raise
        except UserError as error:
            problems.append(str(error))
            continue
        with whole_file(sums_file) as file:
            file.writelines(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    if problems:
        raise UserError(f"{len(problems)} of {len(names)} files are missing: {problems[0]}")


if __name__ == "__main__":
    cli.run(main)
