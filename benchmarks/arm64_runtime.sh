#!/bin/bash
# Creates a Python for 64-bit ARM with numpy and onnxruntime, for `benchmarks/arm64.py` under qemu-aarch64. It has pip and
# venv, so that it can also be the Python of an SSH device (tests/plugins/devices/test_device_bench.py).
#
#   usage:  bash benchmarks/arm64_runtime.sh        (Debian 13 with apt-get, dpkg-deb and pip; 43 MB are fetched)
#
# Packages are downloaded with apt-get and pip, verified against the digests below, and unpacked into the user's cache.
# Nothing is installed, and the system's package lists do not change.
set -euo pipefail

home="${XDG_CACHE_HOME:-$HOME/.cache}/compress/arm64"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"

cat > debian.sha256 <<'LIST'
0966fc3da1a26cc57647c68b5736f791b6e7eb498173a7993f63b6c89b4ed4f5  libc6_2.41-12+deb13u5_arm64.deb
d9e1c50fcdad079fe16d77f1578adcc763be1bf7f2da7fa8adca7010b0c84c83  libexpat1_2.9.0-1~deb13u1_arm64.deb
d84a783b818f2386627604e64b793eb4ac5bb9ea1ba321a194a1c9c82fe09a01  libffi8_3.4.8-2_arm64.deb
1108bc87879833d6d9a145f22a4a15cddb34e065b4b5f4b97bee586adbac2851  libgcc-s1_14.2.0-19_arm64.deb
18edc2b123e8e81efcc14ea5502454b4505285aa9d3325c22315e9304acb25ca  libssl3t64_3.5.9-1~deb13u1_arm64.deb
3655ef258b19142cf6fe38ef89731d5c630b2cf3309632494a720b28c1cfcd85  libpython3.13-minimal_3.13.5-2+deb13u5_arm64.deb
d1178d24e4d143cc6c577d9dc0f26dd982efccc2e600d25ce86361f168a22be0  libpython3.13-stdlib_3.13.5-2+deb13u5_arm64.deb
6669b0c52a2e7c6af9adfdabce3ff6e286065cdfbc7b85280862b5f799daebee  libstdc++6_14.2.0-19_arm64.deb
e65351935aa4af2b10ae2abb5744f5059e9abad51aea6cd0cb825702010763f7  python3-pip-whl_25.1.1+dfsg-1_all.deb
bc37518ea1eb198d635be16ba234239263b66daf823f3a5cb02316805b88beba  python3.13-venv_3.13.5-2+deb13u5_arm64.deb
ab5ad90f986b315bfa12be50f438aa3453e32da3b29540844d2d847800d2ce08  libzstd1_1.5.7+dfsg-1+deb13u1_arm64.deb
95237a3ad99bf9366308e16f7c79449c9371c4cff9c883772fb7c254652467eb  python3.13-minimal_3.13.5-2+deb13u5_arm64.deb
0e41b3d7ad8ad7fcd36dd4d61ca91a70018478fc4af652e044f4be770784ddff  zlib1g_1%3a1.3.dfsg+really1.3.1-1+deb13u1_arm64.deb
LIST
cat > wheels.txt <<'LIST'
onnxruntime==1.32.0 --hash=sha256:54d02baff2df38777b4c3cc7af326406fe8b8a48f54720f4c446d2d327920a79
numpy==2.2.6 --hash=sha256:f92729c95468a2f4f15e9bb94c432a9229d0d50de67304399627a943201baa2f
LIST

# Package lists and downloads of the other architecture are kept in separate folders.
mkdir -p lists/partial archives/partial packages root
apt=(apt-get -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work")
[ "$(id -u)" != 0 ] || apt+=(-o APT::Sandbox::User=root)
"${apt[@]}" -qq update
names="$(cut -c67- debian.sha256 | sed -E 's/^([^_]+)_([^_]+)_.*/\1=\2/; s/%3a/:/')"
(cd packages && "${apt[@]}" -qq download $names) || {
  echo "apt-get has other versions than these: take a Debian 13 with them, or set versions and digests anew." >&2
  exit 1
}
(cd packages && sha256sum --quiet --check ../debian.sha256)
for package in packages/*.deb; do dpkg-deb -x "$package" root; done
[ -e root/lib ] || ln -s usr/lib root/lib # the link that Debian's base-files package creates

"${PYTHON:-python3}" -m pip install --quiet --no-deps --require-hashes --only-binary :all: --target site -r wheels.txt \
  --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --python-version 3.13 --implementation cp

mkdir -p "$(dirname "$home")"
rm -rf "$home.partial" "$home"
mkdir "$home.partial"
mv root site "$home.partial/"
mv "$home.partial" "$home"
echo "$home"
