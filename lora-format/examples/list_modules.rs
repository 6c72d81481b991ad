//! Lists the modules of an architecture of `lora_format::naming`, a line each: component,
//! parameter in the original checkpoint, module in diffusers, shape, runs of rows as
//! `module row:original row:rows`. `scripts/check_naming.py` compares it with diffusers.

use lora_format::naming::{Architecture, Catalogue};

fn main() {
    for architecture in Architecture::ALL {
        for module in Catalogue::of(architecture).modules() {
            let runs = module.runs.iter();
            let runs =
                runs.map(|run| format!("{}:{}:{}", run.module_row, run.original_row, run.rows));
            println!(
                "{}\t{:?}\t{}\t{}\t{}\t{}\t{}",
                architecture.name(),
                module.part,
                module.original,
                module.diffusers,
                format!("{:?}", module.shape).replace(' ', ""),
                runs.collect::<Vec<_>>().join(","),
                u8::from(module.optional),
            );
        }
    }
}
