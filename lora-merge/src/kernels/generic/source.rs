//! Rows of a matrix on their way into vectors, from wherever they lie.

use std::marker::PhantomData;

use super::super::factors::LANES;
use super::super::sweep::{Line, scalar};
use super::super::vector::Vector;
use super::element::Element;

/// Elements of a matrix, as a type parameter: those of
/// [`Rows`](super::super::sweep::Rows).
pub(crate) trait Source: Copy {
    /// Sixteen elements.
    type Group;

    /// Elements `first..first + count`.
    fn part(self, first: usize, count: usize) -> Self;
    /// All whole groups of sixteen.
    fn groups(self) -> impl Iterator<Item = Self::Group>;
    fn load<V: Vector>(v: V, group: Self::Group) -> V::Floats;
    /// One element.
    fn element(self, index: usize) -> f32;
}

impl<'a> Source for &'a [f32] {
    type Group = &'a [f32; LANES];

    #[inline(always)]
    fn part(self, first: usize, count: usize) -> Self {
        &self[first..first + count]
    }

    #[inline(always)]
    fn groups(self) -> impl Iterator<Item = Self::Group> {
        self.as_chunks().0.iter()
    }

    #[inline(always)]
    fn load<V: Vector>(v: V, group: Self::Group) -> V::Floats {
        v.load(group)
    }

    fn element(self, index: usize) -> f32 {
        self[index]
    }
}

/// Stored elements of one type.
#[derive(Clone, Copy)]
pub(crate) struct Stored<'a, T: Element> {
    bytes: &'a [u8],
    element: PhantomData<T>,
}

impl<'a, T: Element> Stored<'a, T> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, element: PhantomData }
    }
}

impl<'a, T: Element> Source for Stored<'a, T> {
    type Group = &'a [u8];

    #[inline(always)]
    fn part(self, first: usize, count: usize) -> Self {
        let size = T::TYPE.size();
        Self::new(&self.bytes[first * size..][..count * size])
    }

    #[inline(always)]
    fn groups(self) -> impl Iterator<Item = Self::Group> {
        self.bytes.chunks_exact(LANES * T::TYPE.size())
    }

    #[inline(always)]
    fn load<V: Vector>(v: V, group: Self::Group) -> V::Floats {
        T::load(v, group, 0)
    }

    fn element(self, index: usize) -> f32 {
        scalar::decode(T::TYPE, self.bytes, index)
    }
}

/// Stored elements of one type minus those of another.
#[derive(Clone, Copy)]
pub(crate) struct Difference<'a, T: Element, B: Element> {
    tuned: Stored<'a, T>,
    base: Stored<'a, B>,
}

impl<'a, T: Element, B: Element> Difference<'a, T, B> {
    pub(crate) fn new(tuned: &'a [u8], base: &'a [u8]) -> Self {
        Self { tuned: Stored::new(tuned), base: Stored::new(base) }
    }
}

impl<'a, T: Element, B: Element> Source for Difference<'a, T, B> {
    type Group = (&'a [u8], &'a [u8]);

    #[inline(always)]
    fn part(self, first: usize, count: usize) -> Self {
        Self { tuned: self.tuned.part(first, count), base: self.base.part(first, count) }
    }

    #[inline(always)]
    fn groups(self) -> impl Iterator<Item = Self::Group> {
        self.tuned.groups().zip(self.base.groups())
    }

    #[inline(always)]
    fn load<V: Vector>(v: V, (tuned, base): Self::Group) -> V::Floats {
        v.sub(T::load(v, tuned, 0), B::load(v, base, 0))
    }

    fn element(self, index: usize) -> f32 {
        self.tuned.element(index) - self.base.element(index)
    }
}

/// Calls `$token.$function($source, $arguments)` with the [`Source`] that
/// [`Rows`](super::super::sweep::Rows) are.
macro_rules! with_source {
    ($rows:expr, $token:ident.$function:ident($($argument:expr),*)) => {{
        use $crate::kernels::float::FloatType;
        use $crate::kernels::generic::{Bf16, Difference, F16, F32, Stored};
        use $crate::kernels::sweep::Rows;
        macro_rules! of {
            ($tuned:expr, $type:ty) => {
                $token.$function(Stored::<$type>::new($tuned), $($argument),*)
            };
            ($tuned:expr, $tuned_type:ty, $base:expr, $base_type:ty) => {
                $token.$function(
                    Difference::<$tuned_type, $base_type>::new($tuned, $base),
                    $($argument),*
                )
            };
        }
        match $rows {
            Rows::Plain(elements) => $token.$function(elements, $($argument),*),
            Rows::Stored { tuned, tuned_type, base: None } => match tuned_type {
                FloatType::F32 => of!(tuned, F32),
                FloatType::F16 => of!(tuned, F16),
                FloatType::Bf16 => of!(tuned, Bf16),
            },
            Rows::Stored { tuned, tuned_type, base: Some((base, base_type)) } => {
                match (tuned_type, base_type) {
                    (FloatType::F32, FloatType::F32) => of!(tuned, F32, base, F32),
                    (FloatType::F32, FloatType::F16) => of!(tuned, F32, base, F16),
                    (FloatType::F32, FloatType::Bf16) => of!(tuned, F32, base, Bf16),
                    (FloatType::F16, FloatType::F32) => of!(tuned, F16, base, F32),
                    (FloatType::F16, FloatType::F16) => of!(tuned, F16, base, F16),
                    (FloatType::F16, FloatType::Bf16) => of!(tuned, F16, base, Bf16),
                    (FloatType::Bf16, FloatType::F32) => of!(tuned, Bf16, base, F32),
                    (FloatType::Bf16, FloatType::F16) => of!(tuned, Bf16, base, F16),
                    (FloatType::Bf16, FloatType::Bf16) => of!(tuned, Bf16, base, Bf16),
                }
            }
        }
    }};
}
pub(crate) use with_source;

/// A rectangle of a run of rows on its way into a group of lines.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// Columns of the matrix.
    pub(crate) stride: usize,
    pub(crate) row: usize,
    pub(crate) rows: usize,
    pub(crate) col: usize,
    pub(crate) cols: usize,
    /// Rows of the group, those that are missing included.
    pub(crate) group_rows: usize,
}

/// Brings a rectangle into lines: for every sixteen columns, a line for each
/// row of the group. What is missing is +0.
///
/// So the kernels, whatever the width of the matrix, find all they need at
/// fixed distances from one address, and no two rows compete for the same few
/// places in the cache.
#[inline(always)]
pub(crate) fn pack<V: Vector, S: Source>(v: V, source: S, place: &Place, lines: &mut [Line]) {
    let &Place { stride, row, rows, col, cols, group_rows } = place;
    for r in 0..group_rows {
        let mut lines = lines.chunks_exact_mut(group_rows).map(|block| &mut block[r]);
        if r < rows {
            let source = source.part((row + r) * stride + col, cols);
            for (line, group) in lines.by_ref().take(cols / LANES).zip(source.groups()) {
                v.store(S::load(v, group), &mut line.0);
            }
            if let Some(line) = lines.next() {
                let first = cols / LANES * LANES;
                for (lane, to) in line.0.iter_mut().enumerate() {
                    *to = if first + lane < cols { source.element(first + lane) } else { 0.0 };
                }
            }
        }
        for line in lines {
            v.store(v.splat(0.0), &mut line.0);
        }
    }
}

/// [`difference`](super::super::sweep::difference).
#[inline(always)]
pub(crate) fn difference<V: Vector, S: Source>(v: V, source: S, out: &mut [f32]) {
    let (whole, rest) = out.as_chunks_mut::<LANES>();
    let first_rest = whole.len() * LANES;
    let mut sound = v.beyond(0);
    for (out, group) in whole.iter_mut().zip(source.groups()) {
        let value = S::load(v, group);
        sound = v.and(sound, v.is_number(value));
        v.store(value, out);
    }
    for (lane, out) in rest.iter_mut().enumerate() {
        *out = source.element(first_rest + lane);
    }
    scalar::canonicalise(rest);
    if v.any(v.not(sound)) {
        scalar::canonicalise(whole.as_flattened_mut());
    }
}
