//! AVX2 with FMA and F16C: the sixteen lanes are two registers.

#![expect(unsafe_code, reason = "intrinsics and unaligned loads")]

use std::arch::x86_64::*;

use super::super::change::{Run, RunChange, measure};
use super::super::factors::{Factors, LANES};
use super::super::generic::sweep::{self, Ahead, Steps};
use super::super::generic::{self, Element, Place, Source, with_types};
use super::super::stats::{ConvertStats, TileStats};
use super::super::sweep::{BlockRow, Line};
use super::super::vector::{Vector, both, four};
use super::super::{FloatType, Tile, TileRegion};

/// Proof that this CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The proof, if there is one.
    pub(crate) fn new() -> Option<Self> {
        let available = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("popcnt");
        available.then_some(Self(()))
    }

    pub(crate) fn merge_tile(self, tile: &Tile<'_>, out: &mut [u8]) -> TileStats {
        with_types!(tile.base_type, tile.out_type, self.merge(tile, out))
    }

    pub(crate) fn product_tile(self, factors: &Factors, region: TileRegion, out: &mut [f64]) {
        #[target_feature(enable = "avx2,fma,f16c,popcnt")]
        fn product(v: Avx2, factors: &Factors, region: TileRegion, out: &mut [f64]) {
            generic::product(v, factors, region, out);
        }
        // SAFETY: `self` is proof of the features.
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
        #[target_feature(enable = "avx2,fma,f16c,popcnt")]
        fn merge<B: Element, O: Element>(v: Avx2, tile: &Tile<'_>, out: &mut [u8]) -> TileStats {
            generic::merge::<Avx2, B, O>(v, tile, out)
        }
        // SAFETY: `self` is proof of the features.
        unsafe { merge::<B, O>(self, tile, out) }
    }

    fn convert_typed<B: Element, O: Element>(self, base: &[u8], out: &mut [u8]) -> ConvertStats {
        #[target_feature(enable = "avx2,fma,f16c,popcnt")]
        fn convert<B: Element, O: Element>(v: Avx2, base: &[u8], out: &mut [u8]) -> ConvertStats {
            generic::convert::<Avx2, B, O>(v, base, out)
        }
        // SAFETY: `self` is proof of the features.
        unsafe { convert::<B, O>(self, base, out) }
    }
}

impl Steps for Avx2 {
    // 6 rows × 2 registers of sums or weights, 2 of the other factor, 1 of A:
    // 15 of 16.
    const GROUP_ROWS: [usize; 5] = [6; 5];

    fn pack<S: Source>(self, source: S, place: &Place, lines: &mut [Line]) {
        #[target_feature(enable = "avx2,fma,f16c,popcnt")]
        fn pack<S: Source>(v: Avx2, source: S, place: &Place, lines: &mut [Line]) {
            generic::pack(v, source, place, lines);
        }
        // SAFETY: `self` is proof of the features.
        unsafe { pack(self, source, place, lines) }
    }

    fn product<const G: usize>(
        self,
        lines: &[Line],
        x: &[BlockRow<G>],
        w: &mut [BlockRow<G>],
        ahead: &mut Ahead<'_>,
    ) {
        #[target_feature(enable = "avx2,fma,f16c,popcnt")]
        fn product<const G: usize, const R: usize, const C: usize>(
            v: Avx2,
            lines: &[Line],
            x: &[BlockRow<G>],
            w: &mut [BlockRow<G>],
            ahead: &mut Ahead<'_>,
        ) {
            sweep::product::<Avx2, G, R, C>(v, lines, x, w, ahead);
        }
        // SAFETY: `self` is proof of the features.
        unsafe { product::<G, 6, 1>(self, lines, x, w, ahead) }
    }

    fn transposed<const G: usize>(
        self,
        lines: &[Line],
        w: &[BlockRow<G>],
        z: &mut [BlockRow<G>],
        ahead: &mut Ahead<'_>,
    ) {
        #[target_feature(enable = "avx2,fma,f16c,popcnt")]
        fn transposed<const G: usize, const R: usize, const C: usize, const K: usize>(
            v: Avx2,
            lines: &[Line],
            w: &[BlockRow<G>],
            z: &mut [BlockRow<G>],
            ahead: &mut Ahead<'_>,
        ) {
            sweep::transposed::<Avx2, G, R, C, K>(v, lines, w, z, ahead);
        }
        // SAFETY: `self` is proof of the features.
        unsafe { transposed::<G, 6, 1, 1>(self, lines, w, z, ahead) }
    }

    fn settle<const G: usize>(self, rows: &mut [BlockRow<G>]) {
        #[target_feature(enable = "avx2,fma,f16c,popcnt")]
        fn settle<const G: usize>(v: Avx2, rows: &mut [BlockRow<G>]) {
            sweep::settle(v, rows);
        }
        // SAFETY: `self` is proof of the features.
        unsafe { settle(self, rows) }
    }

    fn difference<S: Source>(self, source: S, out: &mut [f32]) {
        #[target_feature(enable = "avx2,fma,f16c,popcnt")]
        fn difference<S: Source>(v: Avx2, source: S, out: &mut [f32]) {
            generic::difference(v, source, out);
        }
        // SAFETY: `self` is proof of the features.
        unsafe { difference(self, source, out) }
    }

    fn energy(self, a: &[f32]) -> f64 {
        #[target_feature(enable = "avx2,fma,f16c,popcnt")]
        fn energy(v: Avx2, a: &[f32]) -> f64 {
            generic::energy(v, a)
        }
        // SAFETY: `self` is proof of the features.
        unsafe { energy(self, a) }
    }

    fn change(self, run: Run<'_>, difference: &mut [f32]) -> RunChange {
        #[target_feature(enable = "avx2,fma,f16c,popcnt")]
        fn change(v: Avx2, run: Run<'_>, difference: &mut [f32]) -> RunChange {
            measure(run, difference, |a| generic::energy(v, a))
        }
        // SAFETY: as in `merge`.
        unsafe { change(self, run, difference) }
    }

    fn residual_energy(self, a: &[f32], product: &[f64]) -> f64 {
        #[target_feature(enable = "avx2,fma,f16c,popcnt")]
        fn residual_energy(v: Avx2, a: &[f32], product: &[f64]) -> f64 {
            generic::residual_energy(v, a, product)
        }
        // SAFETY: `self` is proof of the features.
        unsafe { residual_energy(self, a, product) }
    }
}

/// An intrinsic that reads and writes no memory (a prefetch does neither).
macro_rules! avx2 {
    ($call:expr) => {
        // SAFETY: used in methods of `Avx2` only, where `self` is proof of the
        // features the intrinsic needs.
        unsafe { $call }
    };
}

impl Vector for Avx2 {
    type Floats = [__m256; 2];
    type Bits = [__m256i; 2];
    type Doubles = [__m256d; 4];
    type Halves = __m256i;
    /// All ones or all zeros per lane.
    type Mask = [__m256i; 2];

    // 4 rows × 2 registers of sums, 2 of the right factor, 1 of the left: 11
    // of 16. Eight independent chains are what two ports of latency four need.
    const GROUPS_AT_ONCE: usize = 1;

    #[inline(always)]
    fn splat(self, value: f32) -> [__m256; 2] {
        [avx2!(_mm256_set1_ps(value)); 2]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> [__m256; 2] {
        let (halves, _) = from.as_chunks::<8>();
        // SAFETY: each half is 32 readable bytes; no alignment is needed.
        both!(half => unsafe { _mm256_loadu_ps(halves[half].as_ptr()) })
    }

    #[inline(always)]
    fn store(self, value: [__m256; 2], to: &mut [f32; LANES]) {
        let (halves, _) = to.as_chunks_mut::<8>();
        for (half, value) in halves.iter_mut().zip(value) {
            // SAFETY: each half is 32 writable bytes; no alignment is needed.
            unsafe { _mm256_storeu_ps(half.as_mut_ptr(), value) }
        }
    }

    #[inline(always)]
    fn load_f32(self, from: &[u8; 64]) -> [__m256; 2] {
        let (halves, _) = from.as_chunks::<32>();
        // SAFETY: each half is 32 readable bytes; no alignment is needed.
        both!(half => unsafe { _mm256_loadu_ps(halves[half].as_ptr().cast()) })
    }

    #[inline(always)]
    fn store_f32(self, value: [__m256; 2], to: &mut [u8; 64]) {
        let (halves, _) = to.as_chunks_mut::<32>();
        for (half, value) in halves.iter_mut().zip(value) {
            // SAFETY: each half is 32 writable bytes; no alignment is needed.
            unsafe { _mm256_storeu_ps(half.as_mut_ptr().cast(), value) }
        }
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u8; 32]) -> [__m256; 2] {
        let words = self.load_halves(from);
        let words = [
            avx2!(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(words))),
            avx2!(_mm256_cvtepu16_epi32(_mm256_extracti128_si256::<1>(words))),
        ];
        both!(half => avx2!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(words[half]))))
    }

    #[inline(always)]
    fn store_bf16(self, value: [__m256; 2], to: &mut [u8; 32]) {
        let [lower, upper] =
            both!(half => avx2!(_mm256_srli_epi32::<16>(_mm256_castps_si256(value[half]))));
        // Packing works within 128 bits; the permutation puts the quarters
        // back in order.
        let words =
            avx2!(_mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(lower, upper)));
        self.store_halves(words, to);
    }

    #[inline(always)]
    fn load_halves(self, from: &[u8; 32]) -> __m256i {
        // SAFETY: `from` is 32 readable bytes; no alignment is needed.
        unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_halves(self, value: __m256i, to: &mut [u8; 32]) {
        // SAFETY: `to` is 32 writable bytes; no alignment is needed.
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), value) }
    }

    #[inline(always)]
    fn widen_halves(self, value: __m256i) -> [__m256; 2] {
        [
            avx2!(_mm256_cvtph_ps(_mm256_castsi256_si128(value))),
            avx2!(_mm256_cvtph_ps(_mm256_extracti128_si256::<1>(value))),
        ]
    }

    #[inline(always)]
    fn narrow_to_halves(self, value: [__m256; 2]) -> __m256i {
        let [lower, upper] =
            both!(half => avx2!(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value[half])));
        avx2!(_mm256_set_m128i(upper, lower))
    }

    #[inline(always)]
    fn will_read(self, bytes: &[u8], at: usize) {
        avx2!(_mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(at).cast()));
    }

    #[inline(always)]
    fn will_write(self, bytes: &mut [u8], at: usize) {
        avx2!(_mm_prefetch::<_MM_HINT_ET0>(bytes.as_ptr().wrapping_add(at).cast()));
    }

    #[inline(always)]
    fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both!(half => avx2!(_mm256_add_ps(a[half], b[half])))
    }

    #[inline(always)]
    fn sub(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both!(half => avx2!(_mm256_sub_ps(a[half], b[half])))
    }

    #[inline(always)]
    fn mul_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        both!(half => avx2!(_mm256_fmadd_ps(a[half], b[half], c[half])))
    }

    #[inline(always)]
    fn bits_of(self, value: [__m256; 2]) -> [__m256i; 2] {
        both!(half => avx2!(_mm256_castps_si256(value[half])))
    }

    #[inline(always)]
    fn floats_of(self, bits: [__m256i; 2]) -> [__m256; 2] {
        both!(half => avx2!(_mm256_castsi256_ps(bits[half])))
    }

    #[inline(always)]
    fn add_bits(self, a: [__m256i; 2], b: u32) -> [__m256i; 2] {
        both!(half => avx2!(_mm256_add_epi32(a[half], _mm256_set1_epi32(b.cast_signed()))))
    }

    #[inline(always)]
    fn and_bits(self, a: [__m256i; 2], b: u32) -> [__m256i; 2] {
        both!(half => avx2!(_mm256_and_si256(a[half], _mm256_set1_epi32(b.cast_signed()))))
    }

    #[inline(always)]
    fn add_parity_of_upper_half(self, a: [__m256i; 2]) -> [__m256i; 2] {
        let parity = self.and_bits(both!(half => avx2!(_mm256_srli_epi32::<16>(a[half]))), 1);
        both!(half => avx2!(_mm256_add_epi32(a[half], parity[half])))
    }

    #[inline(always)]
    fn is_nonzero(self, value: [__m256; 2]) -> [__m256i; 2] {
        both!(half => {
            avx2!(_mm256_castps_si256(_mm256_cmp_ps::<_CMP_NEQ_UQ>(value[half], _mm256_setzero_ps())))
        })
    }

    #[inline(always)]
    fn is_number(self, value: [__m256; 2]) -> [__m256i; 2] {
        both!(half => avx2!(_mm256_castps_si256(_mm256_cmp_ps::<_CMP_ORD_Q>(value[half], value[half]))))
    }

    #[inline(always)]
    fn is_less(self, a: [__m256; 2], b: f32) -> [__m256i; 2] {
        both!(half => {
            avx2!(_mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(
                a[half],
                _mm256_set1_ps(b)
            )))
        })
    }

    #[inline(always)]
    fn are_clear(self, value: [__m256i; 2], mask: u32) -> [__m256i; 2] {
        let masked = self.and_bits(value, mask);
        both!(half => avx2!(_mm256_cmpeq_epi32(masked[half], _mm256_setzero_si256())))
    }

    #[inline(always)]
    fn are_equal(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        both!(half => avx2!(_mm256_cmpeq_epi32(a[half], b[half])))
    }

    #[inline(always)]
    fn none(self) -> [__m256i; 2] {
        [avx2!(_mm256_setzero_si256()); 2]
    }

    #[inline(always)]
    fn beyond(self, count: usize) -> [__m256i; 2] {
        let last = count.min(LANES) as i32 - 1;
        let lanes = avx2!(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        let last = [last, last - 8];
        both!(half => avx2!(_mm256_cmpgt_epi32(lanes, _mm256_set1_epi32(last[half]))))
    }

    #[inline(always)]
    fn not(self, mask: [__m256i; 2]) -> [__m256i; 2] {
        both!(half => avx2!(_mm256_xor_si256(mask[half], _mm256_set1_epi32(-1))))
    }

    #[inline(always)]
    fn and(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        both!(half => avx2!(_mm256_and_si256(a[half], b[half])))
    }

    #[inline(always)]
    fn or(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        both!(half => avx2!(_mm256_or_si256(a[half], b[half])))
    }

    #[inline(always)]
    fn any(self, mask: [__m256i; 2]) -> bool {
        let either = avx2!(_mm256_or_si256(mask[0], mask[1]));
        avx2!(_mm256_testz_si256(either, either)) == 0
    }

    #[inline(always)]
    fn count(self, mask: [__m256i; 2]) -> u32 {
        // Sixteen lanes of 32 ones fit sixteen lanes of 16 ones, fit a byte
        // mask with two ones per lane.
        let words = avx2!(_mm256_packs_epi32(mask[0], mask[1]));
        avx2!(_mm256_movemask_epi8(words)).count_ones() / 2
    }

    #[inline(always)]
    fn splat_f64(self, value: f64) -> [__m256d; 4] {
        [avx2!(_mm256_set1_pd(value)); 4]
    }

    #[inline(always)]
    fn load_f64(self, from: &[f64; LANES]) -> [__m256d; 4] {
        let (quarters, _) = from.as_chunks::<4>();
        // SAFETY: each quarter is 32 readable bytes; no alignment is needed.
        four!(quarter => unsafe { _mm256_loadu_pd(quarters[quarter].as_ptr()) })
    }

    #[inline(always)]
    fn store_f64(self, value: [__m256d; 4], to: &mut [f64; LANES]) {
        let (quarters, _) = to.as_chunks_mut::<4>();
        for (quarter, value) in quarters.iter_mut().zip(value) {
            // SAFETY: each quarter is 32 writable bytes; no alignment is needed.
            unsafe { _mm256_storeu_pd(quarter.as_mut_ptr(), value) }
        }
    }

    #[inline(always)]
    fn widen(self, value: [__m256; 2]) -> [__m256d; 4] {
        let [a, b] = value;
        [
            avx2!(_mm256_cvtps_pd(_mm256_castps256_ps128(a))),
            avx2!(_mm256_cvtps_pd(_mm256_extractf128_ps::<1>(a))),
            avx2!(_mm256_cvtps_pd(_mm256_castps256_ps128(b))),
            avx2!(_mm256_cvtps_pd(_mm256_extractf128_ps::<1>(b))),
        ]
    }

    #[inline(always)]
    fn narrow(self, value: [__m256d; 4]) -> [__m256; 2] {
        let [a, b, c, d] = four!(quarter => avx2!(_mm256_cvtpd_ps(value[quarter])));
        [avx2!(_mm256_set_m128(b, a)), avx2!(_mm256_set_m128(d, c))]
    }

    #[inline(always)]
    fn add_f64(self, a: [__m256d; 4], b: [__m256d; 4]) -> [__m256d; 4] {
        four!(quarter => avx2!(_mm256_add_pd(a[quarter], b[quarter])))
    }

    #[inline(always)]
    fn mul_f64(self, a: [__m256d; 4], b: [__m256d; 4]) -> [__m256d; 4] {
        four!(quarter => avx2!(_mm256_mul_pd(a[quarter], b[quarter])))
    }

    #[inline(always)]
    fn mul_add_f64(self, a: [__m256d; 4], b: [__m256d; 4], c: [__m256d; 4]) -> [__m256d; 4] {
        four!(quarter => avx2!(_mm256_fmadd_pd(a[quarter], b[quarter], c[quarter])))
    }
}
