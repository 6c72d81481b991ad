//! AVX-512: the sixteen lanes are one register.
//!
//! Subsets used: F, BW, DQ and VL, present together since 2017. The bfloat16
//! subset is left alone on purpose: its conversions flush subnormals.

#![expect(unsafe_code, reason = "intrinsics and unaligned loads")]

use std::arch::x86_64::*;

use super::super::change::{Run, RunChange, measure};
use super::super::factors::{Factors, LANES};
use super::super::generic::sweep::{self, Ahead, Steps};
use super::super::generic::{self, Element, Place, Source, with_types};
use super::super::stats::{ConvertStats, TileStats};
use super::super::sweep::{BlockRow, Line};
use super::super::vector::{Vector, both};
use super::super::{FloatType, Tile, TileRegion};

/// Proof that this CPU has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The proof, if there is one.
    pub(crate) fn new() -> Option<Self> {
        let available = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("popcnt");
        available.then_some(Self(()))
    }

    pub(crate) fn merge_tile(self, tile: &Tile<'_>, out: &mut [u8]) -> TileStats {
        with_types!(tile.base_type, tile.out_type, self.merge(tile, out))
    }

    pub(crate) fn product_tile(self, factors: &Factors, region: TileRegion, out: &mut [f64]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")]
        fn product(v: Avx512, factors: &Factors, region: TileRegion, out: &mut [f64]) {
            generic::product(v, factors, region, out);
        }
        // SAFETY: as in `merge`.
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
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")]
        fn merge<B: Element, O: Element>(v: Avx512, tile: &Tile<'_>, out: &mut [u8]) -> TileStats {
            generic::merge::<Avx512, B, O>(v, tile, out)
        }
        // SAFETY: `self` is proof of the features; AVX2, FMA and F16C are part
        // of AVX-512 F.
        unsafe { merge::<B, O>(self, tile, out) }
    }

    fn convert_typed<B: Element, O: Element>(self, base: &[u8], out: &mut [u8]) -> ConvertStats {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")]
        fn convert<B: Element, O: Element>(v: Avx512, base: &[u8], out: &mut [u8]) -> ConvertStats {
            generic::convert::<Avx512, B, O>(v, base, out)
        }
        // SAFETY: as in `merge`.
        unsafe { convert::<B, O>(self, base, out) }
    }
}

impl Steps for Avx512 {
    // 16 rows × 1 register or 8 rows × 2 of sums or weights, and 8 or 2 of the
    // other factor: 18 to 24 of 32.
    const GROUP_ROWS: [usize; 5] = [16, 16, 8, 16, 8];

    fn pack<S: Source>(self, source: S, place: &Place, lines: &mut [Line]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")]
        fn pack<S: Source>(v: Avx512, source: S, place: &Place, lines: &mut [Line]) {
            generic::pack(v, source, place, lines);
        }
        // SAFETY: as in `merge`.
        unsafe { pack(self, source, place, lines) }
    }

    fn product<const G: usize>(
        self,
        lines: &[Line],
        x: &[BlockRow<G>],
        w: &mut [BlockRow<G>],
        ahead: &mut Ahead<'_>,
    ) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")]
        fn product<const G: usize, const R: usize, const C: usize>(
            v: Avx512,
            lines: &[Line],
            x: &[BlockRow<G>],
            w: &mut [BlockRow<G>],
            ahead: &mut Ahead<'_>,
        ) {
            sweep::product::<Avx512, G, R, C>(v, lines, x, w, ahead);
        }
        // SAFETY: as in `merge`.
        unsafe {
            match Self::GROUP_ROWS[G] {
                8 => product::<G, 8, 2>(self, lines, x, w, ahead),
                _ => product::<G, 16, 1>(self, lines, x, w, ahead),
            }
        }
    }

    fn transposed<const G: usize>(
        self,
        lines: &[Line],
        w: &[BlockRow<G>],
        z: &mut [BlockRow<G>],
        ahead: &mut Ahead<'_>,
    ) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")]
        fn transposed<const G: usize, const R: usize, const C: usize, const K: usize>(
            v: Avx512,
            lines: &[Line],
            w: &[BlockRow<G>],
            z: &mut [BlockRow<G>],
            ahead: &mut Ahead<'_>,
        ) {
            sweep::transposed::<Avx512, G, R, C, K>(v, lines, w, z, ahead);
        }
        // SAFETY: as in `merge`.
        unsafe {
            match Self::GROUP_ROWS[G] {
                8 => transposed::<G, 8, 2, 4>(self, lines, w, z, ahead),
                _ => transposed::<G, 16, 1, 8>(self, lines, w, z, ahead),
            }
        }
    }

    fn settle<const G: usize>(self, rows: &mut [BlockRow<G>]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")]
        fn settle<const G: usize>(v: Avx512, rows: &mut [BlockRow<G>]) {
            sweep::settle(v, rows);
        }
        // SAFETY: as in `merge`.
        unsafe { settle(self, rows) }
    }

    fn difference<S: Source>(self, source: S, out: &mut [f32]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")]
        fn difference<S: Source>(v: Avx512, source: S, out: &mut [f32]) {
            generic::difference(v, source, out);
        }
        // SAFETY: as in `merge`.
        unsafe { difference(self, source, out) }
    }

    fn energy(self, a: &[f32]) -> f64 {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")]
        fn energy(v: Avx512, a: &[f32]) -> f64 {
            generic::energy(v, a)
        }
        // SAFETY: as in `merge`.
        unsafe { energy(self, a) }
    }

    fn change(self, run: Run<'_>, difference: &mut [f32]) -> RunChange {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")]
        fn change(v: Avx512, run: Run<'_>, difference: &mut [f32]) -> RunChange {
            measure(run, difference, |a| generic::energy(v, a))
        }
        // SAFETY: as in `merge`.
        unsafe { change(self, run, difference) }
    }

    fn residual_energy(self, a: &[f32], product: &[f64]) -> f64 {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")]
        fn residual_energy(v: Avx512, a: &[f32], product: &[f64]) -> f64 {
            generic::residual_energy(v, a, product)
        }
        // SAFETY: as in `merge`.
        unsafe { residual_energy(self, a, product) }
    }
}

/// An intrinsic that reads and writes no memory (a prefetch does neither).
macro_rules! avx512 {
    ($call:expr) => {
        // SAFETY: used in methods of `Avx512` only, where `self` is proof of
        // the features the intrinsic needs.
        unsafe { $call }
    };
}

impl Vector for Avx512 {
    type Floats = __m512;
    type Bits = __m512i;
    type Doubles = [__m512d; 2];
    type Halves = __m256i;
    type Mask = __mmask16;

    // 4 rows × 3 registers of sums, 3 of the right factor: 15 of 32.
    const GROUPS_AT_ONCE: usize = 3;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        avx512!(_mm512_set1_ps(value))
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> __m512 {
        // SAFETY: `from` is 64 readable bytes; no alignment is needed.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, value: __m512, to: &mut [f32; LANES]) {
        // SAFETY: `to` is 64 writable bytes; no alignment is needed.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
    }

    #[inline(always)]
    fn load_f32(self, from: &[u8; 64]) -> __m512 {
        // SAFETY: `from` is 64 readable bytes; no alignment is needed.
        unsafe { _mm512_loadu_ps(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_f32(self, value: __m512, to: &mut [u8; 64]) {
        // SAFETY: `to` is 64 writable bytes; no alignment is needed.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr().cast(), value) }
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u8; 32]) -> __m512 {
        let words = self.load_halves(from);
        avx512!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words))))
    }

    #[inline(always)]
    fn store_bf16(self, value: __m512, to: &mut [u8; 32]) {
        // The odd words, moved to the front by one permutation. A shift and
        // a narrowing conversion would take three operations.
        #[rustfmt::skip]
        const ODD_WORDS: [i16; 32] = [
            1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
            1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
        ];
        // SAFETY: `ODD_WORDS` is 64 readable bytes; no alignment is needed.
        let odd_words = unsafe { _mm512_loadu_si512(ODD_WORDS.as_ptr().cast()) };
        let upper = avx512!(_mm512_permutexvar_epi16(odd_words, _mm512_castps_si512(value)));
        self.store_halves(avx512!(_mm512_castsi512_si256(upper)), to);
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
    fn widen_halves(self, value: __m256i) -> __m512 {
        avx512!(_mm512_cvtph_ps(value))
    }

    #[inline(always)]
    fn narrow_to_halves(self, value: __m512) -> __m256i {
        avx512!(_mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(value))
    }

    #[inline(always)]
    fn will_read(self, bytes: &[u8], at: usize) {
        avx512!(_mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(at).cast()));
    }

    #[inline(always)]
    fn will_write(self, bytes: &mut [u8], at: usize) {
        avx512!(_mm_prefetch::<_MM_HINT_ET0>(bytes.as_ptr().wrapping_add(at).cast()));
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        avx512!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn bits_of(self, value: __m512) -> __m512i {
        avx512!(_mm512_castps_si512(value))
    }

    #[inline(always)]
    fn floats_of(self, bits: __m512i) -> __m512 {
        avx512!(_mm512_castsi512_ps(bits))
    }

    #[inline(always)]
    fn add_bits(self, a: __m512i, b: u32) -> __m512i {
        avx512!(_mm512_add_epi32(a, _mm512_set1_epi32(b.cast_signed())))
    }

    #[inline(always)]
    fn and_bits(self, a: __m512i, b: u32) -> __m512i {
        avx512!(_mm512_and_si512(a, _mm512_set1_epi32(b.cast_signed())))
    }

    #[inline(always)]
    fn add_parity_of_upper_half(self, a: __m512i) -> __m512i {
        let parity = self.and_bits(avx512!(_mm512_srli_epi32::<16>(a)), 1);
        avx512!(_mm512_add_epi32(a, parity))
    }

    #[inline(always)]
    fn is_nonzero(self, value: __m512) -> __mmask16 {
        avx512!(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(value, _mm512_setzero_ps()))
    }

    #[inline(always)]
    fn is_number(self, value: __m512) -> __mmask16 {
        avx512!(_mm512_cmp_ps_mask::<_CMP_ORD_Q>(value, value))
    }

    #[inline(always)]
    fn is_less(self, a: __m512, b: f32) -> __mmask16 {
        avx512!(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, _mm512_set1_ps(b)))
    }

    #[inline(always)]
    fn are_clear(self, value: __m512i, mask: u32) -> __mmask16 {
        avx512!(_mm512_testn_epi32_mask(value, _mm512_set1_epi32(mask.cast_signed())))
    }

    #[inline(always)]
    fn are_equal(self, a: __m512i, b: __m512i) -> __mmask16 {
        avx512!(_mm512_cmpeq_epi32_mask(a, b))
    }

    #[inline(always)]
    fn none(self) -> __mmask16 {
        0
    }

    #[inline(always)]
    fn beyond(self, count: usize) -> __mmask16 {
        match count {
            0..LANES => __mmask16::MAX << count,
            _ => 0,
        }
    }

    #[inline(always)]
    fn not(self, mask: __mmask16) -> __mmask16 {
        !mask
    }

    #[inline(always)]
    fn and(self, a: __mmask16, b: __mmask16) -> __mmask16 {
        a & b
    }

    #[inline(always)]
    fn or(self, a: __mmask16, b: __mmask16) -> __mmask16 {
        a | b
    }

    #[inline(always)]
    fn any(self, mask: __mmask16) -> bool {
        mask != 0
    }

    #[inline(always)]
    fn count(self, mask: __mmask16) -> u32 {
        mask.count_ones()
    }

    #[inline(always)]
    fn splat_f64(self, value: f64) -> [__m512d; 2] {
        [avx512!(_mm512_set1_pd(value)); 2]
    }

    #[inline(always)]
    fn load_f64(self, from: &[f64; LANES]) -> [__m512d; 2] {
        let (halves, _) = from.as_chunks::<8>();
        // SAFETY: each half is 64 readable bytes; no alignment is needed.
        both!(half => unsafe { _mm512_loadu_pd(halves[half].as_ptr()) })
    }

    #[inline(always)]
    fn store_f64(self, value: [__m512d; 2], to: &mut [f64; LANES]) {
        let (halves, _) = to.as_chunks_mut::<8>();
        for (half, value) in halves.iter_mut().zip(value) {
            // SAFETY: each half is 64 writable bytes; no alignment is needed.
            unsafe { _mm512_storeu_pd(half.as_mut_ptr(), value) }
        }
    }

    #[inline(always)]
    fn widen(self, value: __m512) -> [__m512d; 2] {
        let upper = avx512!(_mm512_extractf32x8_ps::<1>(value));
        let lower = avx512!(_mm512_castps512_ps256(value));
        [avx512!(_mm512_cvtps_pd(lower)), avx512!(_mm512_cvtps_pd(upper))]
    }

    #[inline(always)]
    fn narrow(self, value: [__m512d; 2]) -> __m512 {
        let [lower, upper] = both!(half => avx512!(_mm512_cvtpd_ps(value[half])));
        avx512!(_mm512_insertf32x8::<1>(_mm512_castps256_ps512(lower), upper))
    }

    #[inline(always)]
    fn add_f64(self, a: [__m512d; 2], b: [__m512d; 2]) -> [__m512d; 2] {
        both!(half => avx512!(_mm512_add_pd(a[half], b[half])))
    }

    #[inline(always)]
    fn mul_f64(self, a: [__m512d; 2], b: [__m512d; 2]) -> [__m512d; 2] {
        both!(half => avx512!(_mm512_mul_pd(a[half], b[half])))
    }

    #[inline(always)]
    fn mul_add_f64(self, a: [__m512d; 2], b: [__m512d; 2], c: [__m512d; 2]) -> [__m512d; 2] {
        both!(half => avx512!(_mm512_fmadd_pd(a[half], b[half], c[half])))
    }
}
