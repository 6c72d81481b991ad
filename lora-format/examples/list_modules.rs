//! What `lora_format::naming` knows, for `scripts/check_naming.py` to compare with diffusers.
//!
//! Without an argument a line for each module: architecture, component, parameter in the original
//! checkpoint, module in diffusers, shape, runs of rows as `module row:original row:rows`, whether
//! it is optional. With `names` a line for each name: architecture, naming, component, name, what
//! it means as `module in diffusers:module row:row of the name:rows`.

use lora_format::naming::{Architecture, Catalogue, Naming};

fn main() {
    let names = std::env::args().nth(1).is_some_and(|argument| argument == "names");
    for architecture in Architecture::ALL {
        let catalogue = Catalogue::of(architecture);
        if names {
            list_names(&catalogue);
        } else {
            list_modules(&catalogue);
        }
    }
}

fn list_modules(catalogue: &Catalogue) {
    for module in catalogue.modules() {
        println!("{}\t{}", catalogue.architecture().name(), module.line());
    }
}

fn list_names(catalogue: &Catalogue) {
    for naming in Naming::ALL {
        let names = catalogue.names(naming);
        for name in names.iter() {
            let Ok(resolved) = names.resolve(name) else {
                println!("{}\t{naming:?}\t?\t{name}\t?", catalogue.architecture().name());
                continue;
            };
            let pieces = resolved.pieces.iter().filter_map(|piece| {
                let module = catalogue.modules().get(piece.module)?;
                let (first, from) = (piece.module_row, piece.from);
                Some(format!("{}:{first}:{from}:{}", module.diffusers, piece.rows))
            });
            println!(
                "{}\t{naming:?}\t{:?}\t{name}\t{}",
                catalogue.architecture().name(),
                resolved.part,
                pieces.collect::<Vec<_>>().join(","),
            );
        }
    }
}
