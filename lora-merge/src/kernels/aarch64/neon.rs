//! Advanced SIMD: the sixteen lanes are four registers.
//!
//! Binary16 goes element by element: its vector conversions are not in stable
//! Rust.

#![expect(unsafe_code, reason = "intrinsics and unaligned loads")]

use std::arch::aarch64::*;
use std::arch::asm;
use std::array;

use super::super::change::{Run, RunChange, measure};
use super::super::factors::{Factors, LANES};
use super::super::generic::sweep::{self, Ahead, Steps};
use super::super::generic::{self, Element, Place, Source, with_types};
use super::super::stats::{ConvertStats, TileStats};
use super::super::sweep::{BlockRow, Line};
use super::super::vector::{Vector, both, eight, four};
use super::super::{FloatType, Tile, TileRegion};

/// Proof that this CPU has Advanced SIMD. Nearly every AArch64 CPU does.
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

impl Neon {
    /// The proof, if there is one.
    pub(crate) fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }

    pub(crate) fn merge_tile(self, tile: &Tile<'_>, out: &mut [u8]) -> TileStats {
        with_types!(tile.base_type, tile.out_type, self.merge(tile, out))
    }

    pub(crate) fn product_tile(self, factors: &Factors, region: TileRegion, out: &mut [f64]) {
        #[target_feature(enable = "neon")]
        fn product(v: Neon, factors: &Factors, region: TileRegion, out: &mut [f64]) {
            generic::product(v, factors, region, out);
        }
        // SAFETY: `self` is proof of the feature.
        unsafe { product(self, factors, region, out) }
    }

    pub(crate) fn convert(
        self,
        base: &[u8],
        base_type: FloatType,
        out: &mut [u8],
        out_type: FloatType,
    ) -> ConvertStats {
        with_types!(base_type, out_type, self.convert_typed(base, out))
    }

    fn merge<B: Element, O: Element>(self, tile: &Tile<'_>, out: &mut [u8]) -> TileStats {
        #[target_feature(enable = "neon")]
        fn merge<B: Element, O: Element>(v: Neon, tile: &Tile<'_>, out: &mut [u8]) -> TileStats {
            generic::merge::<Neon, B, O>(v, tile, out)
        }
        // SAFETY: `self` is proof of the feature.
        unsafe { merge::<B, O>(self, tile, out) }
    }

    fn convert_typed<B: Element, O: Element>(self, base: &[u8], out: &mut [u8]) -> ConvertStats {
        #[target_feature(enable = "neon")]
        fn convert<B: Element, O: Element>(v: Neon, base: &[u8], out: &mut [u8]) -> ConvertStats {
            generic::convert::<Neon, B, O>(v, base, out)
        }
        // SAFETY: `self` is proof of the feature.
        unsafe { convert::<B, O>(self, base, out) }
    }
}

impl Steps for Neon {
    // 6 rows × 4 registers of sums or weights, 4 of the other factor, 1 of A:
    // 29 of 32.
    const GROUP_ROWS: [usize; 5] = [6; 5];

    fn pack<S: Source>(self, source: S, place: &Place, lines: &mut [Line]) {
        #[target_feature(enable = "neon")]
        fn pack<S: Source>(v: Neon, source: S, place: &Place, lines: &mut [Line]) {
            generic::pack(v, source, place, lines);
        }
        // SAFETY: `self` is proof of the feature.
        unsafe { pack(self, source, place, lines) }
    }

    fn product<const G: usize>(
        self,
        lines: &[Line],
        x: &[BlockRow<G>],
        w: &mut [BlockRow<G>],
        ahead: &mut Ahead<'_>,
    ) {
        #[target_feature(enable = "neon")]
        fn product<const G: usize, const R: usize, const C: usize>(
            v: Neon,
            lines: &[Line],
            x: &[BlockRow<G>],
            w: &mut [BlockRow<G>],
            ahead: &mut Ahead<'_>,
        ) {
            sweep::product::<Neon, G, R, C>(v, lines, x, w, ahead);
        }
        // SAFETY: `self` is proof of the feature.
        unsafe { product::<G, 6, 1>(self, lines, x, w, ahead) }
    }

    fn transposed<const G: usize>(
        self,
        lines: &[Line],
        w: &[BlockRow<G>],
        z: &mut [BlockRow<G>],
        ahead: &mut Ahead<'_>,
    ) {
        #[target_feature(enable = "neon")]
        fn transposed<const G: usize, const R: usize, const C: usize, const K: usize>(
            v: Neon,
            lines: &[Line],
            w: &[BlockRow<G>],
            z: &mut [BlockRow<G>],
            ahead: &mut Ahead<'_>,
        ) {
            sweep::transposed::<Neon, G, R, C, K>(v, lines, w, z, ahead);
        }
        // SAFETY: `self` is proof of the feature.
        unsafe { transposed::<G, 6, 1, 1>(self, lines, w, z, ahead) }
    }

    fn settle<const G: usize>(self, rows: &mut [BlockRow<G>]) {
        #[target_feature(enable = "neon")]
        fn settle<const G: usize>(v: Neon, rows: &mut [BlockRow<G>]) {
            sweep::settle(v, rows);
        }
        // SAFETY: `self` is proof of the feature.
        unsafe { settle(self, rows) }
    }

    fn difference<S: Source>(self, source: S, out: &mut [f32]) {
        #[target_feature(enable = "neon")]
        fn difference<S: Source>(v: Neon, source: S, out: &mut [f32]) {
            generic::difference(v, source, out);
        }
        // SAFETY: `self` is proof of the feature.
        unsafe { difference(self, source, out) }
    }

    fn energy(self, a: &[f32]) -> f64 {
        #[target_feature(enable = "neon")]
        fn energy(v: Neon, a: &[f32]) -> f64 {
            generic::energy(v, a)
        }
        // SAFETY: `self` is proof of the feature.
        unsafe { energy(self, a) }
    }

    fn change(self, run: Run<'_>, difference: &mut [f32]) -> RunChange {
        #[target_feature(enable = "neon")]
        fn change(v: Neon, run: Run<'_>, difference: &mut [f32]) -> RunChange {
            measure(run, difference, |a| generic::energy(v, a))
        }
        // SAFETY: as in `merge`.
        unsafe { change(self, run, difference) }
    }

    fn residual_energy(self, a: &[f32], product: &[f64]) -> f64 {
        #[target_feature(enable = "neon")]
        fn residual_energy(v: Neon, a: &[f32], product: &[f64]) -> f64 {
            generic::residual_energy(v, a, product)
        }
        // SAFETY: `self` is proof of the feature.
        unsafe { residual_energy(self, a, product) }
    }
}

/// An intrinsic that touches no memory.
macro_rules! neon {
    ($call:expr) => {
        // SAFETY: used in methods of `Neon` only, where `self` is proof of the
        // feature the intrinsic needs.
        unsafe { $call }
    };
}

impl Vector for Neon {
    type Floats = [float32x4_t; 4];
    type Bits = [uint32x4_t; 4];
    type Doubles = [float64x2_t; 8];
    type Halves = [u16; LANES];
    /// All ones or all zeros per lane.
    type Mask = [uint32x4_t; 4];

    // 4 rows × 4 registers of sums, 4 of the right factor, 1 of the left: 21
    // of 32.
    const GROUPS_AT_ONCE: usize = 1;

    #[inline(always)]
    fn splat(self, value: f32) -> [float32x4_t; 4] {
        [neon!(vdupq_n_f32(value)); 4]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> [float32x4_t; 4] {
        let (quarters, _) = from.as_chunks::<4>();
        // SAFETY: each quarter is 16 readable bytes.
        four!(quarter => unsafe { vld1q_f32(quarters[quarter].as_ptr()) })
    }

    #[inline(always)]
    fn store(self, value: [float32x4_t; 4], to: &mut [f32; LANES]) {
        let (quarters, _) = to.as_chunks_mut::<4>();
        for (quarter, value) in quarters.iter_mut().zip(value) {
            // SAFETY: each quarter is 16 writable bytes.
            unsafe { vst1q_f32(quarter.as_mut_ptr(), value) }
        }
    }

    #[inline(always)]
    fn load_f32(self, from: &[u8; 64]) -> [float32x4_t; 4] {
        let (quarters, _) = from.as_chunks::<16>();
        four!(quarter => {
            // SAFETY: a quarter is 16 readable bytes, and loads of bytes need
            // no alignment.
            let bytes = unsafe { vld1q_u8(quarters[quarter].as_ptr()) };
            neon!(vreinterpretq_f32_u8(bytes))
        })
    }

    #[inline(always)]
    fn store_f32(self, value: [float32x4_t; 4], to: &mut [u8; 64]) {
        let (quarters, _) = to.as_chunks_mut::<16>();
        for (quarter, value) in quarters.iter_mut().zip(value) {
            let bytes = neon!(vreinterpretq_u8_f32(value));
            // SAFETY: a quarter is 16 writable bytes, and stores of bytes need
            // no alignment.
            unsafe { vst1q_u8(quarter.as_mut_ptr(), bytes) }
        }
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u8; 32]) -> [float32x4_t; 4] {
        let (halves, _) = from.as_chunks::<16>();
        let [a, b]: [uint16x8_t; 2] = both!(half => {
            // SAFETY: a half is 16 readable bytes, and loads of bytes need no
            // alignment.
            let bytes = unsafe { vld1q_u8(halves[half].as_ptr()) };
            neon!(vreinterpretq_u16_u8(bytes))
        });
        let words = [
            neon!(vshll_n_u16::<16>(vget_low_u16(a))),
            neon!(vshll_n_u16::<16>(vget_high_u16(a))),
            neon!(vshll_n_u16::<16>(vget_low_u16(b))),
            neon!(vshll_n_u16::<16>(vget_high_u16(b))),
        ];
        self.floats_of(words)
    }

    #[inline(always)]
    fn store_bf16(self, value: [float32x4_t; 4], to: &mut [u8; 32]) {
        let bits = self.bits_of(value);
        let [a, b, c, d] = four!(quarter => neon!(vshrn_n_u32::<16>(bits[quarter])));
        let words = [neon!(vcombine_u16(a, b)), neon!(vcombine_u16(c, d))];
        let (halves, _) = to.as_chunks_mut::<16>();
        for (half, words) in halves.iter_mut().zip(words) {
            let bytes = neon!(vreinterpretq_u8_u16(words));
            // SAFETY: a half is 16 writable bytes, and stores of bytes need no
            // alignment.
            unsafe { vst1q_u8(half.as_mut_ptr(), bytes) }
        }
    }

    #[inline(always)]
    fn load_halves(self, from: &[u8; 32]) -> [u16; LANES] {
        let (elements, _) = from.as_chunks::<2>();
        array::from_fn(|lane| u16::from_le_bytes(elements[lane]))
    }

    #[inline(always)]
    fn store_halves(self, value: [u16; LANES], to: &mut [u8; 32]) {
        let (elements, _) = to.as_chunks_mut::<2>();
        for (element, value) in elements.iter_mut().zip(value) {
            *element = value.to_le_bytes();
        }
    }

    #[inline(always)]
    fn widen_halves(self, value: [u16; LANES]) -> [float32x4_t; 4] {
        self.load(&value.map(|bits| FloatType::F16.decode(u32::from(bits))))
    }

    #[inline(always)]
    fn narrow_to_halves(self, value: [float32x4_t; 4]) -> [u16; LANES] {
        let mut lanes = [0.0; LANES];
        self.store(value, &mut lanes);
        lanes.map(|lane| FloatType::F16.encode(f64::from(lane)) as u16)
    }

    #[inline(always)]
    fn will_read(self, bytes: &[u8], at: usize) {
        let line = bytes.as_ptr().wrapping_add(at);
        // SAFETY: a prefetch changes no state of the program and faults at no
        // address.
        unsafe {
            asm!("prfm pldl1keep, [{}]", in(reg) line, options(nostack, readonly, preserves_flags));
        }
    }

    #[inline(always)]
    fn will_write(self, bytes: &mut [u8], at: usize) {
        let line = bytes.as_ptr().wrapping_add(at);
        // SAFETY: as in `will_read`.
        unsafe {
            asm!("prfm pstl1keep, [{}]", in(reg) line, options(nostack, readonly, preserves_flags));
        }
    }

    #[inline(always)]
    fn add(self, a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        four!(quarter => neon!(vaddq_f32(a[quarter], b[quarter])))
    }

    #[inline(always)]
    fn sub(self, a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        four!(quarter => neon!(vsubq_f32(a[quarter], b[quarter])))
    }

    #[inline(always)]
    fn mul_add(
        self,
        a: [float32x4_t; 4],
        b: [float32x4_t; 4],
        c: [float32x4_t; 4],
    ) -> [float32x4_t; 4] {
        four!(quarter => neon!(vfmaq_f32(c[quarter], a[quarter], b[quarter])))
    }

    #[inline(always)]
    fn bits_of(self, value: [float32x4_t; 4]) -> [uint32x4_t; 4] {
        four!(quarter => neon!(vreinterpretq_u32_f32(value[quarter])))
    }

    #[inline(always)]
    fn floats_of(self, bits: [uint32x4_t; 4]) -> [float32x4_t; 4] {
        four!(quarter => neon!(vreinterpretq_f32_u32(bits[quarter])))
    }

    #[inline(always)]
    fn add_bits(self, a: [uint32x4_t; 4], b: u32) -> [uint32x4_t; 4] {
        four!(quarter => neon!(vaddq_u32(a[quarter], vdupq_n_u32(b))))
    }

    #[inline(always)]
    fn and_bits(self, a: [uint32x4_t; 4], b: u32) -> [uint32x4_t; 4] {
        four!(quarter => neon!(vandq_u32(a[quarter], vdupq_n_u32(b))))
    }

    #[inline(always)]
    fn add_parity_of_upper_half(self, a: [uint32x4_t; 4]) -> [uint32x4_t; 4] {
        let parity = self.and_bits(four!(quarter => neon!(vshrq_n_u32::<16>(a[quarter]))), 1);
        four!(quarter => neon!(vaddq_u32(a[quarter], parity[quarter])))
    }

    #[inline(always)]
    fn is_nonzero(self, value: [float32x4_t; 4]) -> [uint32x4_t; 4] {
        four!(quarter => neon!(vmvnq_u32(vceqzq_f32(value[quarter]))))
    }

    #[inline(always)]
    fn is_number(self, value: [float32x4_t; 4]) -> [uint32x4_t; 4] {
        four!(quarter => neon!(vceqq_f32(value[quarter], value[quarter])))
    }

    #[inline(always)]
    fn is_less(self, a: [float32x4_t; 4], b: f32) -> [uint32x4_t; 4] {
        four!(quarter => neon!(vcltq_f32(a[quarter], vdupq_n_f32(b))))
    }

    #[inline(always)]
    fn are_clear(self, value: [uint32x4_t; 4], mask: u32) -> [uint32x4_t; 4] {
        let masked = self.and_bits(value, mask);
        four!(quarter => neon!(vceqzq_u32(masked[quarter])))
    }

    #[inline(always)]
    fn are_equal(self, a: [uint32x4_t; 4], b: [uint32x4_t; 4]) -> [uint32x4_t; 4] {
        four!(quarter => neon!(vceqq_u32(a[quarter], b[quarter])))
    }

    #[inline(always)]
    fn none(self) -> [uint32x4_t; 4] {
        [neon!(vdupq_n_u32(0)); 4]
    }

    #[inline(always)]
    fn beyond(self, count: usize) -> [uint32x4_t; 4] {
        const INDICES: [u32; 4] = [0, 1, 2, 3];
        // SAFETY: `INDICES` is 16 readable bytes.
        let indices = unsafe { vld1q_u32(INDICES.as_ptr()) };
        four!(quarter => {
            let before = count.saturating_sub(4 * quarter).min(4) as u32;
            neon!(vcgeq_u32(indices, vdupq_n_u32(before)))
        })
    }

    #[inline(always)]
    fn not(self, mask: [uint32x4_t; 4]) -> [uint32x4_t; 4] {
        four!(quarter => neon!(vmvnq_u32(mask[quarter])))
    }

    #[inline(always)]
    fn and(self, a: [uint32x4_t; 4], b: [uint32x4_t; 4]) -> [uint32x4_t; 4] {
        four!(quarter => neon!(vandq_u32(a[quarter], b[quarter])))
    }

    #[inline(always)]
    fn or(self, a: [uint32x4_t; 4], b: [uint32x4_t; 4]) -> [uint32x4_t; 4] {
        four!(quarter => neon!(vorrq_u32(a[quarter], b[quarter])))
    }

    #[inline(always)]
    fn any(self, [a, b, c, d]: [uint32x4_t; 4]) -> bool {
        neon!(vmaxvq_u32(vorrq_u32(vorrq_u32(a, b), vorrq_u32(c, d)))) != 0
    }

    #[inline(always)]
    fn count(self, [a, b, c, d]: [uint32x4_t; 4]) -> u32 {
        // All ones is −1, so the sum of the lanes is minus the count.
        neon!(vaddvq_u32(vaddq_u32(vaddq_u32(a, b), vaddq_u32(c, d)))).wrapping_neg()
    }

    #[inline(always)]
    fn splat_f64(self, value: f64) -> [float64x2_t; 8] {
        [neon!(vdupq_n_f64(value)); 8]
    }

    #[inline(always)]
    fn load_f64(self, from: &[f64; LANES]) -> [float64x2_t; 8] {
        let (pairs, _) = from.as_chunks::<2>();
        // SAFETY: each pair is 16 readable bytes.
        eight!(pair => unsafe { vld1q_f64(pairs[pair].as_ptr()) })
    }

    #[inline(always)]
    fn store_f64(self, value: [float64x2_t; 8], to: &mut [f64; LANES]) {
        let (pairs, _) = to.as_chunks_mut::<2>();
        for (pair, value) in pairs.iter_mut().zip(value) {
            // SAFETY: each pair is 16 writable bytes.
            unsafe { vst1q_f64(pair.as_mut_ptr(), value) }
        }
    }

    #[inline(always)]
    fn widen(self, value: [float32x4_t; 4]) -> [float64x2_t; 8] {
        eight!(pair => {
            let quarter = value[pair / 2];
            match pair % 2 {
                0 => neon!(vcvt_f64_f32(vget_low_f32(quarter))),
                _ => neon!(vcvt_high_f64_f32(quarter)),
            }
        })
    }

    #[inline(always)]
    fn narrow(self, value: [float64x2_t; 8]) -> [float32x4_t; 4] {
        four!(quarter => {
            let low = neon!(vcvt_f32_f64(value[2 * quarter]));
            neon!(vcvt_high_f32_f64(low, value[2 * quarter + 1]))
        })
    }

    #[inline(always)]
    fn add_f64(self, a: [float64x2_t; 8], b: [float64x2_t; 8]) -> [float64x2_t; 8] {
        eight!(pair => neon!(vaddq_f64(a[pair], b[pair])))
    }

    #[inline(always)]
    fn mul_f64(self, a: [float64x2_t; 8], b: [float64x2_t; 8]) -> [float64x2_t; 8] {
        eight!(pair => neon!(vmulq_f64(a[pair], b[pair])))
    }

    #[inline(always)]
    fn mul_add_f64(
        self,
        a: [float64x2_t; 8],
        b: [float64x2_t; 8],
        c: [float64x2_t; 8],
    ) -> [float64x2_t; 8] {
        eight!(pair => neon!(vfmaq_f64(c[pair], a[pair], b[pair])))
    }
}
