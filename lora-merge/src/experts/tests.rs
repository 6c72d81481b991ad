//! The views into the factors, against the definitions.

use super::Lie;
use super::layout::{Layout, Packing, Pair, Side, Stacked};
use crate::low_rank::{Factor, Stride, View};
use crate::orientation::Orientation;

/// The flat index of an element of a view.
fn at(view: View, row: usize, col: usize) -> usize {
    assert!(row < view.rows && col < view.cols);
    view.offset + row * view.row_stride + col * view.col_stride
}

fn shapes() -> impl Iterator<Item = Stacked> {
    let lengths = [1, 2, 3, 5];
    let of = move |experts| {
        lengths.into_iter().flat_map(move |rank| {
            [(1, 1), (2, 3), (4, 2)].map(|(a, b)| Stacked { experts, rank, a, b })
        })
    };
    [1, 2, 3, 4].into_iter().flat_map(of)
}

const PACKINGS: [Packing; 2] = [Packing::RankMajor, Packing::Blocks];

/// Row e·r + k of A is rank k of expert e; so is column k·E + e or e·r + k of B.
#[test]
fn views_are_what_the_layouts_are_defined_to_be() {
    for shape in shapes() {
        let Stacked { experts, rank, a, b } = shape;
        for (packing, side, expert) in PACKINGS.into_iter().flat_map(|packing| {
            Side::BOTH.into_iter().flat_map(move |s| (0..experts).map(move |e| (packing, s, e)))
        }) {
            let Pair { rows, cols } = shape.expert(expert, packing, side);
            for k in 0..rank {
                let column = match packing {
                    Packing::RankMajor => k * experts + expert,
                    Packing::Blocks => expert * rank + k,
                };
                for m in 0..b {
                    let found = match side {
                        Side::Last => at(rows, m, k),
                        Side::First => at(cols, k, m),
                    };
                    assert_eq!(found, m * (experts * rank) + column, "{shape:?} {packing:?}");
                }
                for n in 0..a {
                    let found = match side {
                        Side::Last => at(cols, k, n),
                        Side::First => at(rows, n, k),
                    };
                    assert_eq!(found, (expert * rank + k) * a + n, "{shape:?} {packing:?}");
                }
            }
        }
    }
}

/// Every element of both factors is used exactly once, also where the rows are cut apart.
#[test]
fn views_use_every_element_once() {
    for shape in shapes() {
        for (packing, side) in PACKINGS.into_iter().flat_map(|p| Side::BOTH.map(|side| (p, side))) {
            let height = match side {
                Side::Last => shape.b,
                Side::First => shape.a,
            };
            for cut in [&[(0, height)][..], &[(0, height / 2), (height / 2, height.div_ceil(2))]] {
                let mut a = vec![0; shape.experts * shape.rank * shape.a];
                let mut b = vec![0; shape.experts * shape.rank * shape.b];
                for expert in 0..shape.experts {
                    for (number, &(start, count)) in cut.iter().enumerate() {
                        let pair = shape.expert(expert, packing, side).some_rows(start, count);
                        let again = (number > 0).then_some(pair.cols.factor);
                        let lie = Lie { rows: Stride::ALL, transposed: number == 1, again };
                        let term = pair.term((0, 0), 1.0, lie);
                        for view in [term.left, term.right] {
                            if term.again == Some(view.factor) {
                                continue;
                            }
                            let used = if view.factor == Factor::A { &mut a } else { &mut b };
                            for row in 0..view.rows {
                                (0..view.cols).for_each(|col| used[at(view, row, col)] += 1);
                            }
                        }
                    }
                }
                assert!(a.iter().chain(&b).all(|&times| times == 1), "{shape:?} {packing:?}");
            }
        }
    }
}

#[test]
fn layouts_have_names() {
    for layout in Layout::ALL {
        assert_eq!(layout.name().parse(), Ok(layout));
        assert_eq!(layout.to_string(), layout.name());
        assert!(!layout.meaning().is_empty());
    }
    assert!("".parse::<Layout>().is_err());
    assert!("peft-0.17".parse::<Layout>().unwrap_err().contains("peft-0.18"));
}

/// What A has, by the release and by how the module stores its experts.
#[test]
fn releases_give_a_different_dimensions() {
    let (out_in, in_out) = (Some(Orientation::OutIn), Some(Orientation::InOut));
    for (layout, stored, has) in [
        (Layout::Peft, out_in, "the inputs"),
        (Layout::Peft, in_out, "the inputs"),
        (Layout::Peft0190, out_in, "the outputs"),
        (Layout::Peft0190, in_out, "the outputs"),
        (Layout::Peft018, out_in, "the outputs"),
        (Layout::Peft018, in_out, "the inputs"),
        (Layout::BlockWise, out_in, "the inputs"),
        (Layout::BlockWise0190, in_out, "the outputs"),
        (Layout::BlockWise018, out_in, "the outputs"),
    ] {
        assert_eq!(layout.side(stored).of(stored), has, "{layout}");
    }
    assert_eq!(Layout::Peft.side(None), Side::Last);
    assert_eq!(Layout::Peft018.side(None), Side::First);
}
