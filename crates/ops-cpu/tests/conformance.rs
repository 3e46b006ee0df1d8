//! Every operation against the scalar reference, at every instruction set of this machine.

use ops::conformance;
use sparseserve_ops_cpu::{CpuBackend, CpuOptions, Isa};

fn backend(isa: Isa, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: Some(threads), isa: Some(isa) })
        .expect("an available instruction set")
}

fn check(isa: Isa) {
    if !isa.available() {
        eprintln!("SKIPPED: this machine has no {isa}");
        return;
    }
    for round in 0..conformance::seed_factor() {
        for (threads, seed) in [(1, 11 + 2 * round), (4, 12 + 2 * round)] {
            let waves = conformance::check_all(&mut || backend(isa, threads), seed);
            assert!(waves > 0, "seed {seed} is no test of waves");
        }
    }
}

#[test]
fn scalar() {
    check(Isa::Scalar);
}

#[test]
fn avx2() {
    check(Isa::Avx2);
}

#[test]
fn avx512() {
    check(Isa::Avx512);
}

#[test]
fn avx512_bf16() {
    check(Isa::Avx512Bf16);
}
