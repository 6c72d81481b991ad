//! Which tensors the forms with tensors of their own have, and what shapes: the table of section 7
//! of `docs/FORMAT.md`, the same for what is read and for what is to be written.

use crate::dtype::Dtype;
use crate::error::{AdapterProblem, Shape};
use crate::limits;
use crate::tensor::Tensor;

/// The tensors that stand together, by role, each with its shape. A shape is a product of lengths;
/// a name stands for the same length of at least 1 throughout a form. Some names are special:
///
/// | name | stands for |
/// |---|---|
/// | a number | itself |
/// | `n?` | a length that may be 0 |
/// | `triangle` | b(b−1)/2 for a b of at least 1 |
/// | `1…` | any number of ones |
/// | `kernel` | one to three lengths |
/// | `kernel?` | none to three lengths |
/// | `ones` | as many ones as the kernel has lengths |
/// | `line` | any shape of which at most one length is not 1 |
type Alternative = &'static [(&'static str, &'static str)];

/// Of several alternatives, a component has one.
type Slot = &'static [Alternative];

/// Of every form but those that section 2 describes.
const FORMS: [(&str, &[Slot]); 15] = [
    ("bounded", &[&[&[("A", "r × in"), ("B", "out × r"), ("bound", "1"), ("norms", "in")]]]),
    ("butterfly", &[&[&[("generators", "factors × blocks × b × b"), ("gain", "line")]]]),
    ("circulant", &[&[&[("kernels", "rows × columns × b")]]]),
    ("experts", &[&[&[("A", "rows × in"), ("B", "out × rows")]]]),
    ("gain", &[&[&[("gain", "line")]]]),
    ("grid", &[&[&[("A", "k × i × r"), ("B", "k × r × o")]]]),
    (
        "hadamard",
        &[&[
            &[("w1a", "out × r"), ("w1b", "r × in"), ("w2a", "out × q"), ("w2b", "q × in")],
            &[
                ("t1", "p × r × kernel"),
                ("w1a", "p × out"),
                ("w1b", "r × in"),
                ("t2", "s × q × kernel"),
                ("w2a", "s × out"),
                ("w2b", "q × in"),
            ],
        ]],
    ),
    (
        "kronecker",
        &[
            &[&[("w1", "a × b")], &[("w1a", "a × r"), ("w1b", "r × b")]],
            &[
                &[("w2", "c × d × kernel?")],
                &[("w2a", "c × q"), ("w2b", "q × d")],
                &[("t2", "s × q × kernel"), ("w2a", "s × c"), ("w2b", "q × d")],
            ],
        ],
    ),
    (
        "proportional",
        &[&[
            &[("A", "r × in × kernel?"), ("B", "out × r × ones")],
            &[("embedding_A", "r × in"), ("embedding_B", "out × r")],
        ]],
    ),
    ("reflections", &[&[&[("vectors", "in × r")]]]),
    ("rotation", &[&[&[("generators", "blocks × triangle")]]]),
    ("shared", &[&[&[("A", "r × most"), ("B", "rows × r"), ("in_gain", "r"), ("out_gain", "o")]]]),
    ("sparse", &[&[&[("values", "n?"), ("indices", "2 × n?")]]]),
    ("tiled", &[&[&[("block", "r × columns")], &[("bat", "blocks × r × r")]]]),
    ("tucker", &[&[&[("mid", "q × r × kernel"), ("A", "r × in × 1…"), ("B", "out × q × 1…")]]]),
];

/// The magnitudes of a decomposed change.
const MAGNITUDE: Slot = &[&[], &[("magnitude", "line")], &[("in_magnitude", "line")]];

fn slots(form: &str) -> impl Iterator<Item = Slot> {
    let slots = FORMS.iter().find(|known| known.0 == form).map_or(&[] as &[Slot], |known| known.1);
    let magnitude = (form != "experts" && !slots.is_empty()).then_some(MAGNITUDE);
    slots.iter().copied().chain(magnitude)
}

/// The form of that name.
pub(super) fn form_named(name: &str) -> Option<&'static str> {
    FORMS.iter().map(|known| known.0).find(|known| *known == name)
}

/// The role of that name, if a component's own tensors of that form have it.
pub(super) fn role_named(form: &str, name: &str) -> Option<&'static str> {
    let is_shared = form == "shared" && (name == "A" || name == "B");
    let mut roles = slots(form).flatten().copied().flatten().map(|entry| entry.0);
    roles.find(|role| *role == name && !is_shared)
}

/// What is wrong with the tensors of a form: `tensors` are all of them by role, and `name` is what
/// the tensor of a role is called.
pub(super) fn check(
    parameter: &str,
    form: &'static str,
    tensors: &[(&'static str, &Tensor)],
    name: &dyn Fn(&str) -> String,
) -> Vec<AdapterProblem> {
    let mut lengths = Lengths::default();
    let mut problems = Vec::new();
    for slot in slots(form) {
        let in_slot = |role: &str| slot.iter().copied().flatten().any(|entry| entry.0 == role);
        let found = || tensors.iter().filter(|entry| in_slot(entry.0));
        let fits = |alternative: &&Alternative| {
            found().count() == alternative.len()
                && found().all(|found| alternative.iter().any(|entry| entry.0 == found.0))
        };
        let Some(alternative) = slot.iter().find(fits) else {
            let roles = found().map(|entry| format!("`{}`", entry.0)).collect::<Vec<_>>();
            let (parameter, roles) = (parameter.to_owned(), roles.join(", "));
            problems.push(AdapterProblem::FormRoles { parameter, form, roles });
            continue;
        };
        // A kernel belongs to one side.
        lengths.kernel = None;
        for &(role, shape) in *alternative {
            let Some((_, tensor)) = tensors.iter().find(|entry| entry.0 == role) else { continue };
            problems.extend(check_dtype(&name(role), role, tensor));
            if !lengths.fit(shape, &tensor.shape) {
                let (tensor, found) = (name(role), Shape(tensor.shape.clone()));
                let line = "lengths of which at most one is not 1";
                let expected = if shape == "line" { line } else { shape };
                problems.push(AdapterProblem::FormShape { tensor, found, expected });
                // What the others should be is then not known.
                return problems;
            }
        }
    }
    let is_known = |role: &str| slots(form).flatten().copied().flatten().any(|it| it.0 == role);
    if let Some((role, _)) = tensors.iter().find(|entry| !is_known(entry.0)) {
        let (parameter, roles) = (parameter.to_owned(), format!("`{role}`"));
        problems.push(AdapterProblem::FormRoles { parameter, form, roles });
    }
    for rank in lengths.known.iter().filter(|known| matches!(known.0, "r" | "q" | "p" | "s")) {
        if rank.1 > limits::RANK {
            let (module, rank, limit) = (parameter.to_owned(), rank.1, limits::RANK);
            problems.push(AdapterProblem::RankRange { module, rank, limit });
        }
    }
    problems
}

fn check_dtype(name: &str, role: &str, tensor: &Tensor) -> Option<AdapterProblem> {
    let (tensor, dtype) = (name.to_owned(), tensor.dtype);
    if role == "indices" {
        let fits = matches!(dtype, Dtype::I32 | Dtype::I64);
        return (!fits).then_some(AdapterProblem::IndexDtype { tensor, dtype });
    }
    (!dtype.is_merge_float()).then_some(AdapterProblem::FactorDtype { tensor, dtype })
}

/// The lengths that names stand for.
#[derive(Default)]
struct Lengths<'a> {
    known: Vec<(&'static str, usize)>,
    kernel: Option<&'a [usize]>,
}

impl<'a> Lengths<'a> {
    /// Whether a shape is as expected; what its names stand for is then known.
    fn fit(&mut self, expected: &'static str, shape: &'a [usize]) -> bool {
        if expected == "line" {
            let others = shape.iter().filter(|&&length| length != 1);
            return !shape.contains(&0) && others.count() <= 1;
        }
        let mut rest = shape;
        for name in expected.split(" × ") {
            let taken = match name {
                "1…" => rest.iter().take_while(|&&length| length == 1).count(),
                "kernel" | "kernel?" | "ones" => rest.len(),
                _ => 1,
            };
            let Some((lengths, after)) = rest.split_at_checked(taken) else { return false };
            if !self.fit_name(name, lengths) {
                return false;
            }
            rest = after;
        }
        rest.is_empty()
    }

    fn fit_name(&mut self, name: &'static str, lengths: &'a [usize]) -> bool {
        match (name, lengths) {
            ("1…", _) => true,
            ("kernel" | "kernel?", _) => {
                let least = usize::from(name == "kernel");
                (least..=3).contains(&lengths.len())
                    && !lengths.contains(&0)
                    && *self.kernel.get_or_insert(lengths) == lengths
            }
            ("ones", _) => {
                let count = self.kernel.map_or(0, <[usize]>::len);
                lengths.len() == count && lengths.iter().all(|&length| length == 1)
            }
            ("triangle", &[elements]) => block_of(elements).is_some(),
            (_, &[length]) => match name.parse::<usize>() {
                Ok(number) => length == number,
                Err(_) => (length > 0 || name.ends_with('?')) && self.same(name, length),
            },
            _ => false,
        }
    }

    /// Whether a name stands for this length, or for none yet.
    fn same(&mut self, name: &'static str, length: usize) -> bool {
        match self.known.iter().find(|known| known.0 == name) {
            Some(known) => known.1 == length,
            None => {
                self.known.push((name, length));
                true
            }
        }
    }
}

/// The b of which b(b−1)/2 is `elements`.
pub(super) fn block_of(elements: usize) -> Option<usize> {
    let root = elements.checked_mul(8)?.checked_add(1)?.isqrt();
    let block = root.div_ceil(2);
    (block.checked_mul(block - 1)? / 2 == elements).then_some(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(expected: &'static str, shape: &[usize]) -> bool {
        Lengths::default().fit(expected, shape)
    }

    #[test]
    fn shapes_are_products_of_lengths() {
        assert!(fits("out × r", &[4, 2]) && fits("r × r", &[3, 3]));
        assert!(!fits("out × r", &[4]) && !fits("out × r", &[4, 2, 1]) && !fits("r × r", &[3, 2]));
        assert!(!fits("out × r", &[0, 2]) && fits("n?", &[0]) && fits("2 × n?", &[2, 7]));
        assert!(!fits("2 × n?", &[3, 7]) && fits("1", &[1]) && !fits("1", &[]));
    }

    #[test]
    fn kernels_have_one_to_three_lengths() {
        for (count, with, perhaps) in
            [(0, false, true), (1, true, true), (3, true, true), (4, false, false)]
        {
            let shape: Vec<usize> = [5, 6].into_iter().chain((0..count).map(|_| 2)).collect();
            assert_eq!(fits("q × r × kernel", &shape), with);
            assert_eq!(fits("a × b × kernel?", &shape), perhaps);
        }
        assert!(fits("r × in × 1…", &[2, 3]) && fits("r × in × 1…", &[2, 3, 1, 1]));
        assert!(!fits("r × in × 1…", &[2, 3, 1, 2]));
        let mut lengths = Lengths::default();
        assert!(lengths.fit("r × in × kernel?", &[2, 3, 5, 5]));
        assert!(!lengths.fit("out × r × ones", &[4, 2, 1]));
        assert!(lengths.fit("out × r × ones", &[4, 2, 1, 1]));
    }

    #[test]
    fn lines_and_triangles() {
        for line in [&[][..], &[1], &[7], &[1, 7], &[7, 1], &[1, 7, 1, 1]] {
            assert!(fits("line", line), "{line:?}");
        }
        assert!(!fits("line", &[0, 1]) && !fits("line", &[2, 2]));
        for block in 1..100 {
            assert_eq!(block_of(block * (block - 1) / 2), Some(block));
        }
        assert!(fits("blocks × triangle", &[2, 0]) && !fits("blocks × triangle", &[2, 4]));
        assert_eq!(block_of(usize::MAX), None);
    }

    #[test]
    fn a_factor_that_all_share_is_no_role_of_one() {
        assert_eq!(role_named("shared", "A"), None);
        assert_eq!(role_named("shared", "in_gain"), Some("in_gain"));
        assert_eq!(role_named("shared", "magnitude"), Some("magnitude"));
        assert_eq!(role_named("experts", "magnitude"), None);
        assert_eq!(role_named("unknown", "magnitude"), None);
    }
}
