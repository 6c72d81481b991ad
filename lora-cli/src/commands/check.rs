//! `lora-cli check`: does an adapter load where it is to be used, and is all of it used there?

use std::path::PathBuf;

use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use lora_format::check::{self, Consumer, Finding, Fix, Kind};
use lora_format::checkpoint::Checkpoint;
use lora_format::codec::{self, BaseShapes, WriteOptions};
use lora_format::model::AdapterFormat;
use lora_format::{Adapter, native};
use lora_merge::{Error as MergeError, MergeOptions, MergePlan};
use serde::Serialize;

use super::adapter_output::OutputFormat;
use super::convert::shapes;
use super::{AdapterArguments, WriteArguments};
use crate::failure::{Failure, Outcome};
use crate::printer;

/// Say whether an adapter will load, and whether every tensor of it will be used
///
/// Exit status 1 if anything is found. With --base, every name and shape is held against the model;
/// with --for, against what a program makes of it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  lora-cli check ./my-lora
  lora-cli check ./my-lora --base Llama-3-8B --for vllm
  lora-cli check style.safetensors --for comfyui,diffusers --json")]
pub(crate) struct Arguments {
    /// The adapter
    adapter: PathBuf,
    /// The model that it is for
    #[arg(long, value_name = "MODEL")]
    base: Option<PathBuf>,
    /// The programs that are to load it
    #[arg(long = "for", value_name = "PROGRAM", value_delimiter = ',')]
    consumers: Vec<Program>,
    #[command(flatten)]
    adapter_options: AdapterArguments,
    /// Print a report as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// A [`Consumer`] on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Program(Consumer);

impl ValueEnum for Program {
    fn value_variants<'a>() -> &'a [Program] {
        const ALL: [Program; 6] = [
            Program(Consumer::Vllm),
            Program(Consumer::Transformers),
            Program(Consumer::LlamaCpp),
            Program(Consumer::ComfyUi),
            Program(Consumer::Mlx),
            Program(Consumer::Diffusers),
        ];
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.0.name()))
    }
}

/// `lora-cli/check/1`
#[derive(Debug, Serialize)]
struct JsonReport {
    schema: &'static str,
    adapter: String,
    format: &'static str,
    components: usize,
    findings: Vec<JsonFinding>,
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct JsonFinding {
    kind: &'static str,
    program: Option<&'static str>,
    names: Vec<String>,
    what: String,
    fix: Option<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let base = arguments.base.as_deref();
    let options = arguments.adapter_options.read_options(base)?;
    let adapter = lora_format::read(&arguments.adapter, &options)?;
    let shapes = base.map(shapes).transpose()?;
    let trial = Trial {
        arguments,
        adapter: &adapter,
        shapes,
        options: WriteOptions { base_config: options.base_config, ..WriteOptions::default() },
    };
    let mut findings: Vec<JsonFinding> = Vec::new();
    if let Some(finding) = damaged(&adapter)? {
        findings.push(trial.describe(finding, None));
    }
    findings.extend(check::content(&adapter).into_iter().map(|it| trial.describe(it, None)));
    if base.is_some() {
        let fits = trial.against_the_base()?;
        findings.extend(fits.into_iter().map(|it| trial.describe(it, None)));
    }
    for program in &arguments.consumers {
        let found = check::consumer(&adapter, program.0).into_iter();
        findings.extend(found.map(|it| trial.describe(it, Some(program.0))));
    }
    let found = !findings.is_empty();
    let report = JsonReport {
        schema: "lora-cli/check/1",
        adapter: arguments.adapter.display().to_string(),
        format: adapter.format.name(),
        components: adapter.components.len(),
        findings,
        notes: adapter.notes.iter().map(ToString::to_string).collect(),
    };
    if arguments.json {
        printer::json(&report)?;
    } else {
        printer::data(&text(&report))?;
    }
    Ok(if found { Outcome::Finding } else { Outcome::Done })
}

/// Whether a file of our own format is what was written.
fn damaged(adapter: &Adapter) -> Result<Option<Finding>, Failure> {
    if adapter.format != AdapterFormat::Native {
        return Ok(None);
    }
    let file = lora_format::container::safetensors::SafetensorsFile::open(&adapter.path)?;
    Ok(match native::verify_digest(&file)? {
        native::DigestVerdict::Intact { .. } => None,
        native::DigestVerdict::Damaged { .. } => Some(Finding {
            kind: Kind::Damaged,
            names: Vec::new(),
            what: "its data is not what was written: the digest differs".to_owned(),
            fix: None,
        }),
    })
}

/// What findings are tried with.
struct Trial<'a> {
    arguments: &'a Arguments,
    adapter: &'a Adapter,
    shapes: Option<BaseShapes>,
    options: WriteOptions,
}

impl Trial<'_> {
    /// What keeps it from being merged into the base.
    fn against_the_base(&self) -> Result<Vec<Finding>, Failure> {
        let Some(path) = &self.arguments.base else { return Ok(Vec::new()) };
        let base = Checkpoint::open(path)?;
        let finding = |kind, what| Finding { kind, names: Vec::new(), what, fix: None };
        match MergePlan::new(base, vec![self.adapter.clone().into()], &MergeOptions::default()) {
            Ok(_) => Ok(Vec::new()),
            Err(MergeError::Plan { problems, .. }) => Ok(problems
                .iter()
                .map(|problem| finding(Kind::Refused, format!("does not fit the base: {problem}")))
                .collect()),
            Err(error @ MergeError::DifferentBase { .. }) => {
                Ok(vec![finding(Kind::Refused, error.to_string())])
            }
            Err(error) => Err(error.into()),
        }
    }

    fn describe(&self, finding: Finding, program: Option<Consumer>) -> JsonFinding {
        let Finding { kind, names, what, fix } = finding;
        JsonFinding {
            kind: kind.name(),
            program: program.map(Consumer::name),
            names,
            what,
            fix: fix.map(|fix| self.fix(fix)),
        }
    }

    /// The command that mends it, which was tried.
    fn fix(&self, fix: Fix) -> String {
        let adapter = self.arguments.adapter.display();
        match fix {
            Fix::Convert(format) => {
                let base = match &self.arguments.base {
                    Some(base) => format!(" --base {}", base.display()),
                    None => String::new(),
                };
                match self.convert(format) {
                    Ok(()) => format!("lora-cli convert {adapter} --to {format}{base} -o OUT"),
                    Err(failure) => {
                        format!("none found: converting it to {format} fails: {failure}")
                    }
                }
            }
            _ => {
                let base = match &self.arguments.base {
                    Some(base) => base.display().to_string(),
                    None => "BASE".to_owned(),
                };
                format!("merge it, and use the result: lora-cli merge {base} {adapter} -o OUT")
            }
        }
    }

    /// Converts it, to where nobody looks.
    fn convert(&self, format: AdapterFormat) -> Result<(), String> {
        let scratch = tempfile::tempdir().map_err(|error| error.to_string())?;
        let write = WriteArguments { force: false, no_fsync: true };
        let output = OutputFormat::of(format);
        let text = |failure: Failure| match failure {
            Failure::Error { message, hint, .. } => match hint {
                Some(hint) => format!("{message} (hint: {hint})"),
                None => message,
            },
            Failure::Interrupted | Failure::ClosedPipe => "interrupted".to_owned(),
        };
        let (spelled, _) =
            codec::respell(self.adapter, format, self.shapes.as_ref(), &self.options)
                .map_err(|error| text(error.into()))?;
        let path = scratch.path().join("trial");
        output.write_with(&spelled, &path, &write, &self.options).map(drop).map_err(text)
    }
}

/// How many names of a finding are shown; `--json` has all.
const SHOWN: usize = 5;

fn text(report: &JsonReport) -> String {
    let mut text =
        format!("{}: {}, {} components\n", report.adapter, report.format, report.components);
    for finding in &report.findings {
        let program = finding.program.map(|name| format!(" by {name}")).unwrap_or_default();
        text.push_str(&format!("{}{program}: ", finding.kind));
        let shown: Vec<String> =
            finding.names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
        if !shown.is_empty() {
            text.push_str(&shown.join(", "));
            if finding.names.len() > SHOWN {
                text.push_str(&format!(" and {} more", finding.names.len() - SHOWN));
            }
            text.push_str(": ");
        }
        text.push_str(&finding.what);
        text.push('\n');
        if let Some(fix) = &finding.fix {
            text.push_str(&format!("  fix: {fix}\n"));
        }
    }
    for note in &report.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    if report.findings.is_empty() {
        text.push_str("nothing found\n");
    }
    text
}
