#!/bin/sh
# Runs the kernel tests on AArch64, emulated, from an x86-64 Debian machine.
#
# Installs (as root, only with --install; Debian 12 "bookworm" or later):
#   rustc-web, libstd-rust-web-dev:arm64   Debian's recent rustc and its AArch64 std
#   gcc-aarch64-linux-gnu, libc6-dev-arm64-cross   the linker and C library
#   qemu-user                              the emulator
# Debian's rustc goes to /usr/bin; a rustup toolchain is left alone.
#
# Proves: the kernels compile for AArch64 with nothing but std, and on the NEON
# unit as QEMU models it every test of the kernels passes, that is, NEON gives
# the bits of the scalar oracle. It says nothing about speed.
#
# The test harness of std starts a thread per test, which user-mode emulation
# does not survive on every kernel, so a dozen lines of runner replace it. The
# replacement needs unstable features, hence RUSTC_BOOTSTRAP; the kernels do
# not.
#
# Usage: scripts/test-neon.sh [--install]
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

if [ "${1:-}" = --install ]; then
    dpkg --add-architecture arm64
    apt-get update
    apt-get install -y --no-install-recommends rustc-web libstd-rust-web-dev:arm64 \
        gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat > "$work/runner.rs" <<RUNNER
#![feature(custom_test_frameworks, test)]
#![test_runner(run)]
extern crate test;

#[path = "$root/lora-merge/src/kernels/mod.rs"]
pub mod kernels;

fn run(tests: &[&test::TestDescAndFn]) {
    use kernels::Isa;
    assert_eq!(Isa::detect(), Isa::Neon);
    println!("instruction sets: {:?}", Isa::available());
    for test in tests {
        let test::TestFn::StaticTestFn(body) = test.testfn else { unreachable!() };
        print!("test {} ... ", test.desc.name);
        let passed = std::panic::catch_unwind(|| body().unwrap()).is_ok();
        assert_eq!(passed, test.desc.should_panic == test::ShouldPanic::No);
        println!("ok");
    }
    println!("{} tests passed", tests.len());
}
RUNNER

RUSTC_BOOTSTRAP=1 /usr/bin/rustc --test --edition 2024 -C opt-level=2 \
    --target aarch64-unknown-linux-gnu -C linker=aarch64-linux-gnu-gcc \
    "$work/runner.rs" -o "$work/runner"

RUST_BACKTRACE=0 qemu-aarch64 -L /usr/aarch64-linux-gnu "$work/runner"
