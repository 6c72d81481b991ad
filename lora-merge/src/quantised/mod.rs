//! Bases whose weights are stored quantised: which tensors make up which weight, and what its
//! elements are.
//!
//! A quantised weight is several tensors: codes, scales, sometimes zero points or a table. [`find`]
//! reads the headers (and the few bytes of data that describe other tensors), pairs them up and
//! checks every shape, so that [`QuantisedWeight::read`] can decode any run of elements without
//! being able to fail. The tensors decide; `quantization_config` of `config.json` is held against
//! them, and where the two disagree the base is refused.
//!
//! | file         | owns                                                             |
//! |--------------|------------------------------------------------------------------|
//! | `survey`     | the search: tensors by suffix, what is claimed, what is left over |
//! | `config`     | typed access to `quantization_config`                            |
//! | `rules`      | what it says about FP8, FP4 and plain integers                   |
//! | `problem`    | what can be wrong with a quantised base                          |
//! | `number`     | the small number formats and their rounding                      |
//! | `grid`       | matrices cut into blocks that share one scale                    |
//! | `scaled`     | codes times scales: what FP8, FP4 and plain integers come down to |
//! | `fp8`        | FP8 in blocks, rows, groups or as a whole                        |
//! | `compressed` | compressed-tensors other than FP8                                |
//! | `mxfp4`      | gpt-oss experts (`_blocks`, `_scales`)                           |
//! | `bnb`        | bitsandbytes: NF4, FP4, int8                                     |
//! | `grouped`    | codes by groups, stored as (in, out): what the next two share    |
//! | `gptq`       | GPTQ                                                             |
//! | `awq`        | AWQ                                                              |
//!
//! A scheme is a function `find(&mut Survey)`, which claims its tensors and enters its weights, and
//! a variant of `Scheme` with `read`, `requantise` and `codes`, whose parts come as bytes in the
//! order of [`QuantisedWeight::parts`].
//!
//! # Arithmetic
//!
//! Elements are computed in f32 from the stored codes and scales, with the operations of the
//! reference library in its order. Where a library computes in the (half-precision) dtype of the
//! scales, its result is ours rounded to that dtype.

mod awq;
mod bnb;
mod compressed;
mod config;
mod fp8;
mod gptq;
mod grid;
mod grouped;
mod mxfp4;
mod number;
mod problem;
mod rules;
mod scaled;
mod survey;

use std::ops::Range;

use lora_format::Dtype;
use lora_format::checkpoint::{Checkpoint, Location};

pub use problem::QuantisedProblem;
use survey::Survey;

/// The weights that a base stores quantised.
#[derive(Clone, Debug)]
pub struct QuantisedBase {
    /// Every one of them, sorted by name.
    pub weights: Vec<QuantisedWeight>,
    /// `quant_method` of the configuration; without one, what the tensors show.
    pub method: String,
    /// Tensors that only quantised inference uses (scales of activations and of the key-value
    /// cache), sorted by name: a full-precision model has no place for them.
    pub dropped: Vec<Location>,
}

/// One parameter of the full-precision model, as its quantised base stores it.
#[derive(Clone, Debug)]
pub struct QuantisedWeight {
    /// Its name in the full-precision model: `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Its shape there: (out, in) for Linear; (experts, in, out) for the experts of gpt-oss.
    pub shape: Vec<usize>,
    /// Every tensor of the base that it is made of, the codes first.
    pub parts: Vec<Location>,
    /// The dtype that the method itself dequantises to.
    pub dtype: Dtype,
    /// How its elements follow from its parts.
    scheme: Scheme,
}

/// How the elements of a weight follow from its parts.
#[derive(Clone, Debug)]
enum Scheme {
    Scaled(scaled::Scaled),
    Experts(mxfp4::Experts),
    FourBit(bnb::FourBit),
    EightBit(bnb::EightBit),
    Gptq(grouped::Grouped<gptq::Words>),
    Awq(grouped::Grouped<awq::Words>),
}

/// The most tensors that one weight is made of.
const MAX_PARTS: usize = 8;

/// Finds every quantised weight; `None` for a base that is not quantised.
///
/// # Errors
/// Every tensor that does not fit the others, or that nothing explains.
pub fn find(base: &Checkpoint) -> Result<Option<QuantisedBase>, Vec<QuantisedProblem>> {
    let mut survey = Survey::new(base).map_err(|problem| vec![problem])?;
    mxfp4::find(&mut survey);
    fp8::find(&mut survey);
    compressed::find(&mut survey);
    bnb::find(&mut survey);
    gptq::find(&mut survey);
    awq::find(&mut survey);
    survey.finish()
}

impl QuantisedWeight {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Decodes the elements `first .. first + out.len()` of the row-major weight.
    ///
    /// `data` gives the bytes of a part.
    ///
    /// # Panics
    /// If the run ends beyond the weight, or a part has fewer bytes than its header says.
    pub fn read<'a>(&self, data: &dyn Fn(Location) -> &'a [u8], first: usize, out: &mut [f32]) {
        self.check_run(first, out.len());
        let parts = &self.bytes_of_parts(data)[..self.parts.len()];
        match &self.scheme {
            Scheme::Scaled(scheme) => scheme.read(parts, first, out),
            Scheme::Experts(scheme) => scheme.read(parts, first, out),
            Scheme::FourBit(scheme) => scheme.read(parts, first, out),
            Scheme::EightBit(scheme) => scheme.read(parts, first, out),
            Scheme::Gptq(scheme) => scheme.read(parts, first, out),
            Scheme::Awq(scheme) => scheme.read(parts, first, out),
        }
    }

    /// Rounds `values`, which are to replace the elements from `first` on, to what the same scales
    /// (zero points, tables) can represent: what would be left of them if they were quantised
    /// again without new scales. Values beyond the representable range become its end.
    ///
    /// # Panics
    /// As [`QuantisedWeight::read`], and if `values` and `out` differ in length.
    pub fn requantise<'a>(
        &self,
        data: &dyn Fn(Location) -> &'a [u8],
        first: usize,
        values: &[f32],
        out: &mut [f32],
    ) {
        assert_eq!(values.len(), out.len(), "as many results as values");
        self.check_run(first, out.len());
        let parts = &self.bytes_of_parts(data)[..self.parts.len()];
        match &self.scheme {
            Scheme::Scaled(scheme) => scheme.requantise(parts, first, values, out),
            Scheme::Experts(scheme) => scheme.requantise(parts, first, values, out),
            Scheme::FourBit(scheme) => scheme.requantise(parts, first, values, out),
            Scheme::EightBit(scheme) => scheme.requantise(parts, first, values, out),
            Scheme::Gptq(scheme) => scheme.requantise(parts, first, values, out),
            Scheme::Awq(scheme) => scheme.requantise(parts, first, values, out),
        }
    }

    /// The bytes of the codes, `parts[0]`, between which [`QuantisedWeight::read`] finds the
    /// elements `first .. first + count`; the other parts are small. For whoever maps and
    /// releases pages.
    pub fn codes(&self, first: usize, count: usize) -> Range<usize> {
        self.check_run(first, count);
        if count == 0 {
            return 0..0;
        }
        match &self.scheme {
            Scheme::Scaled(scheme) => scheme.codes(first, count),
            Scheme::Experts(scheme) => scheme.codes(first, count),
            Scheme::FourBit(scheme) => scheme.codes(first, count),
            Scheme::EightBit(scheme) => scheme.codes(first, count),
            Scheme::Gptq(scheme) => scheme.codes(first, count),
            Scheme::Awq(scheme) => scheme.codes(first, count),
        }
    }

    fn check_run(&self, first: usize, count: usize) {
        let fits = first.checked_add(count).is_some_and(|end| end <= self.elements());
        assert!(fits, "{count} elements from {first} on are not all in `{}`", self.name);
    }

    fn bytes_of_parts<'a>(&self, data: &dyn Fn(Location) -> &'a [u8]) -> [&'a [u8]; MAX_PARTS] {
        let mut bytes = [&[][..]; MAX_PARTS];
        for (slot, &part) in bytes.iter_mut().zip(&self.parts) {
            *slot = data(part);
        }
        bytes
    }
}
