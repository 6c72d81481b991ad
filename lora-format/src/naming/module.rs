//! One module of an architecture, under its two names.

/// A component of a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Part {
    /// The UNet or the transformer.
    Denoiser,
    /// CLIP ViT-L, the first text encoder of SD1, SDXL, SD3 and Flux.1.
    ClipL,
    /// OpenCLIP ViT-bigG, the second text encoder of SDXL and SD3.
    ClipG,
    /// OpenCLIP ViT-H, the text encoder of SD2.
    ClipH,
    /// T5 v1.1 XXL, of SD3 and Flux.1.
    T5,
}

/// Rows of a module's weight that are consecutive rows of the original parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First row in the module's weight.
    pub module_row: usize,
    /// First row in the original parameter.
    pub original_row: usize,
    /// How many.
    pub rows: usize,
}

/// A module that has a weight, as diffusers or transformers cut it.
///
/// Their cut is the finer one in every architecture here: where the original checkpoint fuses
/// query, key and value, they have three modules, each of which is a run of rows of the original.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// The component it belongs to.
    pub part: Part,
    /// Its path in diffusers or transformers. Its weight is this and `.weight`.
    pub diffusers: String,
    /// The parameter in the original checkpoint that holds its weight, without the prefix that
    /// says which component. Not always `….weight`: `….scale`, `….in_proj_weight`.
    pub original: String,
    /// The shape of its weight in diffusers: (out, in), (out, in, kernel…), (length) of a norm.
    pub shape: Vec<usize>,
    /// Where its rows are in the original: one run, or two whose order is reversed.
    pub runs: Vec<Run>,
    /// Whether some releases of the architecture do without it.
    pub optional: bool,
}

impl Module {
    /// Rows of its weight.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(0)
    }

    /// Its weight in diffusers' files.
    pub fn diffusers_parameter(&self) -> String {
        format!("{}.weight", self.diffusers)
    }

    /// All of it on one line, as the fixtures have it: component, original parameter, module in
    /// diffusers, shape, runs as `module row:original row:rows`, 1 if optional; tabs between.
    pub fn line(&self) -> String {
        let shape = format!("{:?}", self.shape).replace(' ', "");
        let run = |run: &Run| format!("{}:{}:{}", run.module_row, run.original_row, run.rows);
        let runs: Vec<String> = self.runs.iter().map(run).collect();
        let runs = runs.join(",");
        let optional = u8::from(self.optional);
        format!(
            "{:?}\t{}\t{}\t{shape}\t{runs}\t{optional}",
            self.part, self.original, self.diffusers
        )
    }

    /// The original's path as adapters spell it: without `.weight`, whole if it ends otherwise.
    pub fn original_module(&self) -> &str {
        self.original.strip_suffix(".weight").unwrap_or(&self.original)
    }
}

/// What the generators write modules into.
pub(super) struct Builder {
    part: Part,
    pub(super) modules: Vec<Module>,
    pub(super) optional: bool,
}

impl Builder {
    pub(super) fn new(part: Part) -> Builder {
        Builder { part, modules: Vec::new(), optional: false }
    }

    /// A module that is the whole of `original`'s weight.
    pub(super) fn whole(&mut self, original: &str, diffusers: &str, shape: &[usize]) {
        self.parameter(&format!("{original}.weight"), diffusers, shape);
    }

    /// A module that is the whole of a parameter.
    pub(super) fn parameter(&mut self, original: &str, diffusers: &str, shape: &[usize]) {
        let rows = shape.first().copied().unwrap_or(0);
        self.runs(original, diffusers, shape, &[(0, 0, rows)]);
    }

    /// The same path on both sides.
    pub(super) fn same(&mut self, name: &str, shape: &[usize]) {
        self.whole(name, name, shape);
    }

    /// Modules of one input width that are stacked, in this order, in the rows of `original`.
    pub(super) fn fused(&mut self, original: &str, width: usize, parts: &[(&str, usize)]) {
        let mut start = 0_usize;
        for &(diffusers, rows) in parts {
            self.runs(original, diffusers, &[rows, width], &[(0, start, rows)]);
            start = start.saturating_add(rows);
        }
    }

    /// A module whose halves the original stores in the other order: (shift, scale) there,
    /// (scale, shift) in diffusers.
    pub(super) fn swapped(&mut self, original: &str, diffusers: &str, half: usize, width: usize) {
        let original = format!("{original}.weight");
        let runs = [(0, half, half), (half, 0, half)];
        self.runs(&original, diffusers, &[half.saturating_mul(2), width], &runs);
    }

    fn runs(
        &mut self,
        original: &str,
        diffusers: &str,
        shape: &[usize],
        runs: &[(usize, usize, usize)],
    ) {
        let run = |&(module_row, original_row, rows)| Run { module_row, original_row, rows };
        self.modules.push(Module {
            part: self.part,
            diffusers: diffusers.to_owned(),
            original: original.to_owned(),
            shape: shape.to_vec(),
            runs: runs.iter().map(run).collect(),
            optional: self.optional,
        });
    }
}
