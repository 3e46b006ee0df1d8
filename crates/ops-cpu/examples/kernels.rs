//! Prints the kernel benches: `cargo run --release --example kernels -- [THREADS] [DTYPE] [ROUNDS] [FILTER]`.

use ops::DType;
use sparseserve_ops_cpu::CpuOptions;
use sparseserve_ops_cpu::bench::{Options, run};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map(|a| a.parse()).transpose()?;
    let dtype = match arguments.next().as_deref() {
        Some("f32") => DType::F32,
        Some("f16") => DType::F16,
        Some("bf16") | None => DType::Bf16,
        Some(other) => return Err(format!("unknown type {other}").into()),
    };
    let rounds = arguments.next().map_or(Ok(7), |a| a.parse())?;
    let filter = arguments.next().unwrap_or_default();
    let cpu = CpuOptions { threads, isa: None };
    for row in run(&Options { cpu, dtype, rounds, filter })? {
        println!("{row}");
    }
    Ok(())
}
