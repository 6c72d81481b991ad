//! The storage types as the vector code sees them.
//!
//! Rounding here is the easy half. [`Element::round_untied`] is right for every
//! value that is not a NaN and not a tie; [`Element::ties`] says, never missing
//! one, where that cannot be assumed.

use super::super::factors::LANES;
use super::super::float::FloatType;
use super::super::vector::Vector;

/// A storage type, as a type parameter.
pub(crate) trait Element: Copy {
    const TYPE: FloatType;
    /// Sixteen rounded elements on their way to memory.
    type Packed<V: Vector>: Copy;

    /// Sixteen elements, the `group`-th of `row`.
    fn load<V: Vector>(v: V, row: &[u8], group: usize) -> V::Floats;
    fn store<V: Vector>(v: V, packed: Self::Packed<V>, row: &mut [u8], group: usize);

    /// Whether no element of a row is infinite or NaN.
    fn are_finite(row: &[u8]) -> bool;

    /// Lanes that may lie exactly half-way between two values of this type.
    fn ties<V: Vector>(v: V, value: V::Floats) -> V::Mask;
    /// The nearest element and its value, for lanes that are neither NaN nor a tie.
    fn round_untied<V: Vector>(v: V, value: V::Floats) -> (V::Floats, Self::Packed<V>);
    /// The nearest element and its value, ties to even, for lanes that are not NaN.
    fn round<V: Vector>(v: V, value: V::Floats) -> (V::Floats, Self::Packed<V>);
    /// Lanes that, rounded without regard to NaN, are one only if they were
    /// one, and if they were one.
    fn keeps_nans<V: Vector>(v: V, value: V::Floats) -> V::Mask;
}

/// Binary32.
#[derive(Clone, Copy)]
pub(crate) struct F32;
/// Binary16.
#[derive(Clone, Copy)]
pub(crate) struct F16;
/// bfloat16.
#[derive(Clone, Copy)]
pub(crate) struct Bf16;

/// The bytes of one group. The callers' rows are whole panels, so the
/// conversion cannot fail and its check folds away.
#[inline(always)]
fn chunk<const BYTES: usize>(row: &[u8], group: usize) -> &[u8; BYTES] {
    &row.as_chunks().0[group]
}

#[inline(always)]
fn chunk_mut<const BYTES: usize>(row: &mut [u8], group: usize) -> &mut [u8; BYTES] {
    &mut row.as_chunks_mut().0[group]
}

const SINGLE: usize = LANES * 4;

impl Element for F32 {
    const TYPE: FloatType = FloatType::F32;
    type Packed<V: Vector> = V::Floats;

    #[inline(always)]
    fn load<V: Vector>(v: V, row: &[u8], group: usize) -> V::Floats {
        v.load_f32(chunk::<SINGLE>(row, group))
    }

    #[inline(always)]
    fn store<V: Vector>(v: V, packed: V::Floats, row: &mut [u8], group: usize) {
        v.store_f32(packed, chunk_mut(row, group));
    }

    #[inline(always)]
    fn are_finite(row: &[u8]) -> bool {
        let (elements, _) = row.as_chunks();
        elements.iter().all(|bits| Self::TYPE.is_finite(u32::from_le_bytes(*bits)))
    }

    #[inline(always)]
    fn ties<V: Vector>(v: V, _: V::Floats) -> V::Mask {
        v.none()
    }

    #[inline(always)]
    fn round_untied<V: Vector>(_: V, value: V::Floats) -> (V::Floats, V::Floats) {
        (value, value)
    }

    #[inline(always)]
    fn round<V: Vector>(_: V, value: V::Floats) -> (V::Floats, V::Floats) {
        (value, value)
    }

    #[inline(always)]
    fn keeps_nans<V: Vector>(v: V, _: V::Floats) -> V::Mask {
        v.beyond(0)
    }
}

impl Element for Bf16 {
    const TYPE: FloatType = FloatType::Bf16;
    type Packed<V: Vector> = V::Floats;

    #[inline(always)]
    fn load<V: Vector>(v: V, row: &[u8], group: usize) -> V::Floats {
        v.load_bf16(chunk(row, group))
    }

    #[inline(always)]
    fn store<V: Vector>(v: V, packed: V::Floats, row: &mut [u8], group: usize) {
        v.store_bf16(packed, chunk_mut(row, group));
    }

    #[inline(always)]
    fn are_finite(row: &[u8]) -> bool {
        let (elements, _) = row.as_chunks();
        elements.iter().all(|bits| Self::TYPE.is_finite(u32::from(u16::from_le_bytes(*bits))))
    }

    /// The lower half is 0x8000. Adding 0x8000 clears it then, and only then,
    /// and that sum is wanted for rounding anyway.
    #[inline(always)]
    fn ties<V: Vector>(v: V, value: V::Floats) -> V::Mask {
        v.are_clear(v.add_bits(v.bits_of(value), 0x8000), 0xFFFF)
    }

    #[inline(always)]
    fn round_untied<V: Vector>(v: V, value: V::Floats) -> (V::Floats, V::Floats) {
        let rounded = v.add_bits(v.bits_of(value), 0x8000);
        (v.floats_of(v.and_bits(rounded, 0xFFFF_0000)), v.floats_of(rounded))
    }

    #[inline(always)]
    fn round<V: Vector>(v: V, value: V::Floats) -> (V::Floats, V::Floats) {
        let rounded = v.add_bits(v.add_parity_of_upper_half(v.bits_of(value)), 0x7FFF);
        (v.floats_of(v.and_bits(rounded, 0xFFFF_0000)), v.floats_of(rounded))
    }

    /// Adding to a NaN with a full payload carries into the sign.
    #[inline(always)]
    fn keeps_nans<V: Vector>(v: V, value: V::Floats) -> V::Mask {
        v.is_number(value)
    }
}

impl Element for F16 {
    const TYPE: FloatType = FloatType::F16;
    type Packed<V: Vector> = V::Halves;

    #[inline(always)]
    fn load<V: Vector>(v: V, row: &[u8], group: usize) -> V::Floats {
        v.widen_halves(v.load_halves(chunk(row, group)))
    }

    #[inline(always)]
    fn store<V: Vector>(v: V, packed: V::Halves, row: &mut [u8], group: usize) {
        v.store_halves(packed, chunk_mut(row, group));
    }

    #[inline(always)]
    fn are_finite(row: &[u8]) -> bool {
        let (elements, _) = row.as_chunks();
        elements.iter().all(|bits| Self::TYPE.is_finite(u32::from(u16::from_le_bytes(*bits))))
    }

    /// A normal value ties when its lower thirteen bits are 0x1000. Among
    /// subnormals the cut moves up, so all that is certain of a tie is that
    /// its lower twelve bits are clear.
    #[inline(always)]
    fn ties<V: Vector>(v: V, value: V::Floats) -> V::Mask {
        const SMALLEST_NORMAL: f32 = 1.0 / 16384.0;
        let bits = v.bits_of(value);
        let normal = v.are_clear(v.add_bits(bits, 0x1000), 0x1FFF);
        let magnitude = v.floats_of(v.and_bits(bits, 0x7FFF_FFFF));
        let subnormal = v.and(v.is_less(magnitude, SMALLEST_NORMAL), v.are_clear(bits, 0x0FFF));
        v.or(normal, subnormal)
    }

    #[inline(always)]
    fn round_untied<V: Vector>(v: V, value: V::Floats) -> (V::Floats, V::Halves) {
        Self::round(v, value)
    }

    #[inline(always)]
    fn round<V: Vector>(v: V, value: V::Floats) -> (V::Floats, V::Halves) {
        let halves = v.narrow_to_halves(value);
        (v.widen_halves(halves), halves)
    }

    #[inline(always)]
    fn keeps_nans<V: Vector>(v: V, _: V::Floats) -> V::Mask {
        v.beyond(0)
    }
}
