//! What `quantization_config` says about weights, to be held against the tensors.

use lora_format::checkpoint::Checkpoint;

use super::config::Fields;
use super::grid::Grid;
use super::survey::{Part, Result};

/// The kind of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Int,
    Float,
}

/// What the configuration allows of FP8, FP4 and plain integers.
#[derive(Debug)]
pub(super) enum Rules {
    /// There is no configuration.
    Any,
    /// transformers' `fp8` and `fbgemm_fp8`: FP8, in blocks of one size if it is given.
    Fp8 { method: String, block: Option<[usize; 2]>, ignored: Vec<String> },
    /// compressed-tensors: what any of these groups describes.
    Groups { groups: Vec<Group>, ignored: Vec<String> },
    /// A method that has none of them.
    Other { method: String },
}

/// The `weights` of one entry of `config_groups`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    kind: Kind,
    bits: usize,
    symmetric: bool,
    strategy: Strategy,
}

/// Which elements share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strategy {
    /// All.
    Tensor,
    /// Those of a row.
    Channel,
    /// So many consecutive ones of a row.
    Group(usize),
    /// Those of a block of so many rows and columns.
    Block([usize; 2]),
}

impl Strategy {
    fn block(self, rows: usize, columns: usize) -> [usize; 2] {
        match self {
            Strategy::Tensor => [rows, columns],
            Strategy::Channel => [1, columns],
            Strategy::Group(size) => [1, size],
            Strategy::Block(block) => block,
        }
    }
}

/// Bits that a code of either kind may have.
fn is_supported(kind: Kind, bits: usize) -> bool {
    match kind {
        Kind::Int => matches!(bits, 2 | 4 | 8),
        Kind::Float => matches!(bits, 4 | 8),
    }
}

impl Rules {
    /// # Errors
    /// A field of the wrong type, an impossible number, or a transformation of the weights that
    /// their quantisation alone does not undo.
    pub(super) fn of(base: &Checkpoint) -> Result<Rules> {
        let Some(config) = Fields::of(base)? else { return Ok(Rules::Any) };
        let ignored = |key: &str| -> Result<Vec<String>> {
            let names = config.strings(key)?.unwrap_or_default();
            Ok(names.into_iter().map(str::to_owned).collect())
        };
        let groups = config.object("config_groups")?;
        match (config.string("quant_method")?, groups) {
            (Some(method @ ("fp8" | "fbgemm_fp8")), _) => {
                let mut names = ignored("modules_to_not_convert")?;
                names.extend(ignored("ignored_layers")?);
                let block = block_of(&config, "weight_block_size")?;
                Ok(Rules::Fp8 { method: method.to_owned(), block, ignored: names })
            }
            (Some("compressed-tensors" | "sparseml") | None, Some(groups)) => {
                refuse_transforms(&config)?;
                let (groups, ignored) = (groups_of(&groups)?, ignored("ignore")?);
                Ok(Rules::Groups { groups, ignored })
            }
            (Some("compressed-tensors" | "sparseml"), None) => {
                // The key-value cache alone may be quantised.
                match config.object("kv_cache_scheme")? {
                    Some(_) => Ok(Rules::Groups { groups: Vec::new(), ignored: Vec::new() }),
                    None => Err(config.problem("config_groups", "an object")),
                }
            }
            (Some(method), _) => Ok(Rules::Other { method: method.to_owned() }),
            (None, None) => Ok(Rules::Any),
        }
    }

    /// The block sizes that weights of this kind may have; none if any will do.
    ///
    /// # Errors
    /// If the configuration knows no such weights.
    pub(super) fn blocks(
        &self,
        codes: &Part<'_>,
        kind: Kind,
        bits: usize,
        [rows, columns]: [usize; 2],
    ) -> Result<Vec<[usize; 2]>> {
        let found = || describe(kind, bits);
        match self {
            Rules::Any => Ok(Vec::new()),
            Rules::Fp8 { block, .. } if (kind, bits) == (Kind::Float, 8) => {
                Ok(block.iter().copied().collect())
            }
            Rules::Fp8 { method, .. } | Rules::Other { method } => {
                Err(codes.contradiction(format!("quant_method `{method}`"), found()))
            }
            Rules::Groups { groups, .. } => {
                let of_kind = |group: &&Group| (group.kind, group.bits) == (kind, bits);
                let blocks: Vec<[usize; 2]> = groups
                    .iter()
                    .filter(of_kind)
                    .map(|group| group.strategy.block(rows, columns))
                    .collect();
                if blocks.is_empty() {
                    return Err(codes.contradiction(self.described(), found()));
                }
                Ok(blocks)
            }
        }
    }

    /// Refuses a weight of `module` that the configuration describes otherwise, or ignores.
    pub(super) fn check(
        &self,
        codes: &Part<'_>,
        parameter: &str,
        (kind, bits): (Kind, usize),
        grid: &Grid,
        symmetric: bool,
    ) -> Result<()> {
        let (Rules::Fp8 { ignored, .. } | Rules::Groups { ignored, .. }) = self else {
            return Ok(());
        };
        let module = parameter.strip_suffix(".weight").unwrap_or(parameter);
        if ignored.iter().any(|name| name == module) {
            return Err(codes.contradiction("it is not quantised", describe(kind, bits)));
        }
        let Rules::Groups { groups, .. } = self else { return Ok(()) };
        let described = |group: &Group| {
            (group.kind, group.bits, group.symmetric) == (kind, bits, symmetric)
                && group.strategy.block(grid.rows, grid.columns) == grid.block
        };
        if groups.iter().any(described) {
            return Ok(());
        }
        let zeros = if symmetric { "no zero points" } else { "zero points" };
        let found = format!("{} and {zeros}", describe(kind, bits));
        Err(codes.contradiction(self.described(), found))
    }

    /// Whether packed integers may have so many bits.
    pub(super) fn allows_bits(&self, bits: usize) -> bool {
        match self {
            Rules::Groups { groups, .. } => {
                groups.iter().any(|group| (group.kind, group.bits) == (Kind::Int, bits))
            }
            _ => true,
        }
    }

    /// Whether the configuration quantises no weights at all, only what runs through them.
    pub(super) fn is_without_weights(&self) -> bool {
        match self {
            Rules::Groups { groups, .. } => groups.is_empty(),
            _ => false,
        }
    }

    fn described(&self) -> String {
        let Rules::Groups { groups, .. } = self else { return String::new() };
        let each = groups.iter().map(|group| {
            let zeros = if group.symmetric { "symmetric" } else { "asymmetric" };
            format!("{} {zeros}", describe(group.kind, group.bits))
        });
        let list: Vec<String> = each.collect();
        if list.is_empty() { "no weights".to_owned() } else { list.join(" or ") }
    }
}

fn describe(kind: Kind, bits: usize) -> String {
    match kind {
        Kind::Int => format!("{bits}-bit integers"),
        Kind::Float => format!("{bits}-bit floats"),
    }
}

/// A height and a width.
fn block_of(fields: &Fields<'_>, key: &str) -> Result<Option<[usize; 2]>> {
    let Some(sizes) = fields.positives(key)? else { return Ok(None) };
    match *sizes {
        [height, width] => Ok(Some([height, width])),
        _ => Err(fields.problem(key, "two positive integers")),
    }
}

/// The same as a list, or as a text like `128x128`, which is how the first versions of the library
/// wrote it.
fn block_structure(weights: &Fields<'_>) -> Result<[usize; 2]> {
    let key = "block_structure";
    let Ok(Some(text)) = weights.string(key) else {
        let missing = || weights.problem(key, "two positive integers");
        return block_of(weights, key)?.ok_or_else(missing);
    };
    let number = |digits: &str| digits.parse().ok().filter(|&number: &usize| number > 0);
    let numbers = text.split_once('x').map(|(height, width)| (number(height), number(width)));
    match numbers {
        Some((Some(height), Some(width))) => Ok([height, width]),
        _ => Err(weights.problem(key, "two positive integers")),
    }
}

/// The `weights` of every group that has them.
fn groups_of(config: &Fields<'_>) -> Result<Vec<Group>> {
    let mut groups = Vec::new();
    for key in config.keys() {
        let Some(group) = config.object(key)? else { continue };
        if let Some(weights) = group.object("weights")? {
            groups.push(group_of(&weights)?);
        }
    }
    Ok(groups)
}

fn group_of(weights: &Fields<'_>) -> Result<Group> {
    let kind = match weights.string("type")? {
        Some("int") | None => Kind::Int,
        Some("float") => Kind::Float,
        Some(_) => return Err(weights.problem("type", "`int` or `float`")),
    };
    let bits = weights.positive("num_bits")?.unwrap_or(8);
    if !is_supported(kind, bits) {
        return Err(weights.problem("num_bits", "2, 4 or 8 of integers, 4 or 8 of floats"));
    }
    let size = match weights.integer("group_size")? {
        Some(-1) | None => None,
        Some(_) => weights.positive("group_size")?,
    };
    let group = size.map(Strategy::Group);
    let strategy = match weights.string("strategy")? {
        Some("tensor") => Strategy::Tensor,
        Some("channel") => Strategy::Channel,
        Some("group" | "tensor_group") => {
            group.ok_or_else(|| weights.problem("group_size", "a positive integer"))?
        }
        Some("block") => Strategy::Block(block_structure(weights)?),
        Some(_) => {
            return Err(
                weights.problem("strategy", "tensor, channel, group, tensor_group or block")
            );
        }
        // The library's own defaults.
        None if weights.integer("group_size")? == Some(-1) => Strategy::Channel,
        None => group.unwrap_or(Strategy::Tensor),
    };
    let symmetric = weights.boolean("symmetric")?.unwrap_or(true);
    Ok(Group { kind, bits, symmetric, strategy })
}

/// Sparse storage and rotated weights (`transform_config`) are more than quantisation.
fn refuse_transforms(config: &Fields<'_>) -> Result<()> {
    if let Some(sparsity) = config.object("sparsity_config")?
        && !matches!(sparsity.string("format")?, None | Some("dense"))
    {
        return Err(sparsity.problem("format", "`dense`: sparse storage is not supported"));
    }
    let Some(transforms) = config.object("transform_config")? else { return Ok(()) };
    let groups = transforms.object("config_groups")?;
    if groups.is_some_and(|groups| groups.keys().next().is_some()) {
        let expected: &'static str = "nothing: the weights are stored as transformed";
        return Err(config.problem("transform_config", expected));
    }
    Ok(())
}
