//! Conversion between storage types, without Δ.

use super::super::factors::{GROUPS, PANEL};
use super::super::scalar;
use super::super::stats::ConvertStats;
use super::super::vector::Vector;
use super::element::Element;

/// [`convert`](super::super::convert) for one instruction set and one pair of
/// different types.
#[inline(always)]
pub(crate) fn convert<V: Vector, B: Element, O: Element>(
    v: V,
    base: &[u8],
    out: &mut [u8],
) -> ConvertStats {
    let mut stats = ConvertStats::default();
    let bases = base.chunks(PANEL * B::TYPE.size());
    let outs = out.chunks_mut(PANEL * O::TYPE.size());
    for (base, out) in bases.zip(outs) {
        let finished = if base.len() == PANEL * B::TYPE.size() {
            panel::<V, B, O>(v, base, out)
        } else {
            None
        };
        let part = finished.unwrap_or_else(|| scalar::convert(base, B::TYPE, out, O::TYPE));
        stats.merge(&part);
    }
    stats
}

/// Forty-eight elements, or `None` if the outcome is not finite throughout.
#[inline(always)]
fn panel<V: Vector, B: Element, O: Element>(
    v: V,
    base: &[u8],
    out: &mut [u8],
) -> Option<ConvertStats> {
    let mut trace = v.splat(0.0);
    let mut sound = v.beyond(0);
    let mut unchanged = 0;
    for group in 0..GROUPS {
        let value = B::load(v, base, group);
        let (rounded, packed) = O::round(v, value);
        O::store(v, packed, out, group);
        // x − x is zero, or NaN if x is not finite.
        trace = v.add(trace, v.sub(rounded, rounded));
        sound = v.and(sound, O::keeps_nans(v, value));
        unchanged += v.count(v.are_equal(v.bits_of(value), v.bits_of(rounded)));
    }
    if v.any(v.not(v.and(sound, v.is_number(trace)))) {
        return None;
    }
    let elements = PANEL as u64;
    Some(ConvertStats { elements, changed: elements - u64::from(unchanged), overflowed: 0 })
}
