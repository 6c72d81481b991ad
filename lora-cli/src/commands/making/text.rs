//! What the user is told: before, instead of, and after the work.

use std::collections::BTreeMap;

use lora_format::Dtype;
use lora_format::fingerprint::Verdict;
use lora_format::model::Note;
use lora_format::vocabulary;
use lora_merge::Bytes;
use lora_merge::MergePlan;
use lora_merge::names::numberless;
use lora_merge::parameters::Source;
use lora_merge::report::{MergeReport, Realised, Recovered};

use super::{Deed, MakeArguments, Making, RoundingChoice, job_counts, memory_bound, model_name};
use crate::printer;

/// What the user should know before anything is written. Warnings are said even when quiet.
pub(super) fn announce(making: &Making<'_>) {
    let Making { plan, assets, arguments, .. } = making;
    for warning in identity_warnings(making) {
        printer::talk(&warning);
    }
    if arguments.engine.quiet {
        return;
    }
    for line in changes_of_shape(plan) {
        printer::talk(&line);
    }
    // What PEFT saves twice is in every such adapter; --json lists it.
    printer::notes(plan.notes.iter().filter(|note| !matches!(note, Note::PassedOver { .. })));
    for ((from, to), count) in &plan.renames {
        let quoted = |prefix: &str| {
            if prefix.is_empty() { "no prefix".to_owned() } else { format!("`{prefix}.`") }
        };
        printer::talk(&format!(
            "note: {count} modules have {} in the adapter and {} in the base",
            quoted(from),
            quoted(to)
        ));
    }
    if !assets.from_adapter.is_empty() {
        printer::talk(&format!("note: from the adapter: {}", assets.from_adapter.join(", ")));
    }
    for change in &assets.config_changes {
        printer::talk(&format!("note: config.json: {change}"));
    }
    if plan.output.resharded {
        printer::talk(&format!("note: re-sharded into {} files", plan.output.files.len()));
    }
    if !assets.left_behind.is_empty() {
        printer::talk(&format!("note: not copied: {}", assets.left_behind.join(", ")));
    }
}

/// What the output has and the base has not, and the other way round.
fn changes_of_shape(plan: &MergePlan) -> Vec<String> {
    let mut lines = Vec::new();
    for target in &plan.targets {
        let stored = target.parameter.map(|index| &plan.parameters.get(index).shape);
        match stored {
            None => {
                lines.push(format!("note: the output gains `{}` {:?}", target.name, target.shape))
            }
            Some(shape) if *shape != target.shape => lines.push(format!(
                "note: `{}` has shape {:?} in the output, {shape:?} in the base",
                target.name, target.shape
            )),
            Some(_) => {}
        }
    }
    let heads = plan.targets.iter().filter(|target| {
        let stored = target.parameter.map(|index| &plan.parameters.get(index).shape);
        let of_vocabulary = vocabulary::is_either(&target.name);
        target.shape.len() == 2 && stored != Some(&target.shape) && !of_vocabulary
    });
    for head in heads {
        lines.push(format!(
            "note: config.json does not describe `{}`: to load it, name its class and \
             num_labels={}, or set architectures and id2label",
            head.name, head.shape[0]
        ));
    }
    if let Some(rows) = plan.vocabulary {
        lines.push(format!("note: the vocabulary becomes {rows} rows"));
    }
    if plan.untied {
        lines.push("note: input embedding and output head are no longer tied".to_owned());
    }
    if let Some(quantised) = plan.parameters.quantised() {
        lines.push(format!(
            "note: {} quantised weights ({}) are written in full precision",
            quantised.weights.len(),
            quantised.method
        ));
        let dropped = &quantised.dropped;
        if let Some(&first) = dropped.first() {
            lines.push(format!(
                "note: {} tensors that only quantised inference uses are left out, first `{}`",
                dropped.len(),
                plan.base.info(first).name
            ));
        }
    }
    lines
}

/// What is doubtful about the base.
pub(super) fn identity_warnings(making: &Making<'_>) -> Vec<String> {
    let plan = &making.plan;
    if making.deed != Deed::Merge {
        return Vec::new();
    }
    let warnings =
        plan.identity.iter().zip(&plan.adapters).filter_map(|(verdict, one)| match verdict {
            Verdict::Unknown => name_warning(plan, one.adapter.base.name.as_deref()?),
            Verdict::Different { equal, compared, .. } => Some(format!(
                "warning: not the base that {} was trained on ({equal} of {compared} sampled \
                 values agree); merging all the same, as asked",
                one.adapter.path.display()
            )),
            _ => None,
        });
    let mut warnings: Vec<String> = warnings.collect();
    warnings.dedup();
    warnings
}

/// Without a fingerprint only names can be compared, and those are often paths.
fn name_warning(plan: &MergePlan, recorded: &str) -> Option<String> {
    let last = |name: &str| name.trim_end_matches('/').rsplit('/').next().map(str::to_lowercase);
    let directory = plan.base.path().canonicalize().ok()?;
    let config_name = plan.base.config().and_then(|config| config.get("_name_or_path")?.as_str());
    let names = [Some(model_name(&directory)), config_name.map(str::to_owned)];
    if names.iter().flatten().any(|name| last(name) == last(recorded)) {
        return None;
    }
    Some(format!(
        "warning: the adapter was trained on `{recorded}`; whether this base is that model cannot \
         be told (whoever trained it can record that with `lora-cli stamp`)"
    ))
}

/// What a dry run prints.
pub(super) fn planned(making: &Making<'_>) -> String {
    let Making { plan, assets, output, run, .. } = making;
    let mut text = plan.base.path().display().to_string();
    for one in &plan.adapters {
        let sign = if one.undo { '−' } else { '+' };
        text.push_str(&format!(" {sign} {}", one.adapter.path.display()));
        // What is taken out has the sign already.
        let weight = if one.undo { -one.weight } else { one.weight };
        if weight != 1.0 {
            text.push_str(&format!(" × {weight}"));
        }
        text.push_str(&format!(" ({})", one.adapter.format));
    }
    text.push_str(&format!(" → {}\n\n", output.destination.display()));
    text.push_str(&target_table(plan));
    let bytes = plan.output.files.iter().map(|file| file.bytes).sum();
    let (copied, converted) = job_counts(plan);
    text.push_str(&format!(
        "\n{} targets, {copied} tensors copied, {converted} converted\n\
         output: {} in {} safetensors files, {} other files\n\
         memory: at most {}\n",
        plan.targets.len(),
        Bytes(bytes),
        plan.output.files.len(),
        assets.files.len(),
        Bytes(memory_bound(plan, run)),
    ));
    text
}

/// Targets that differ only in their layer number, a line together.
fn target_table(plan: &MergePlan) -> String {
    let mut groups: BTreeMap<(String, String), usize> = BTreeMap::new();
    for target in &plan.targets {
        let changes: Vec<String> = target
            .changes
            .iter()
            .map(|change| {
                let report = plan.describe(target, change);
                let mut words = vec![report.method.to_owned()];
                words.extend(report.orientation.map(|how| how.name().to_owned()));
                words.extend(report.rank.map(|rank| format!("rank {rank}")));
                words.extend(report.scale.map(|scale| format!("scale {scale}")));
                words.join(" ")
            })
            .collect();
        let stored = match target.source {
            Source::Quantised(_) => " quantised",
            _ => "",
        };
        let what = format!("{:?} {}{stored}  {}", target.shape, target.dtype, changes.join(", "));
        *groups.entry((numberless(&target.name), what)).or_default() += 1;
    }
    let width = groups.keys().map(|key| key.0.chars().count()).max().unwrap_or(0);
    let lines = groups
        .iter()
        .map(|((name, what), count)| format!("  {count:>5} × {name:width$}  {what}\n"));
    lines.collect()
}

/// What was done.
pub(super) fn summarise(making: &Making<'_>, report: &MergeReport, seconds: f64) {
    let Making { deed, assets, output, arguments, .. } = making;
    if !arguments.engine.quiet {
        let mut text = format!(
            "{} {} targets into {}: {} in {seconds:.2} s",
            deed.done(),
            report.targets.len(),
            output.destination.display(),
            Bytes(report.bytes),
        );
        let others = assets.files.len();
        let copied = match (report.copied, report.converted) {
            (copied, 0) => format!("{copied} tensors copied bit for bit"),
            (copied, converted) => format!("{copied} tensors copied, {converted} converted"),
        };
        text.push_str(&format!("\n  {copied}, {others} other files"));
        if let Some(line) = realised_line(&report.realised) {
            text.push_str(&format!("\n  {line}"));
        }
        for line in [recovered_line(report), requantised_line(report)].into_iter().flatten() {
            text.push_str(&format!("\n  {line}"));
        }
        printer::talk(&text);
    }
    for warning in warnings(making, report) {
        printer::talk(&warning);
    }
}

/// What the user should know of what was written.
pub(super) fn warnings(making: &Making<'_>, report: &MergeReport) -> Vec<String> {
    let realised = &report.realised;
    let mut warnings = Vec::new();
    // What an adapter holds in full is a change without a delta.
    let brings = report.targets.iter().any(|target| {
        let full = ["replaced", "token rows", "base copy"];
        target.changes.iter().any(|change| full.contains(&change.method))
    });
    if realised.nonzero == 0 && !brings {
        let text = "warning: the adapter's delta is zero everywhere: the output equals the base";
        warnings.push(text.to_owned());
    } else if realised.is_poor() || report.targets.iter().any(|target| target.realised.is_poor()) {
        warnings.push(loss_warning(making.arguments, report));
    }
    let rounded: Vec<_> = report.targets.iter().filter(|target| target.rounded > 0).collect();
    if let Some(first) = rounded.first() {
        warnings.push(format!(
            "note: {} tensors that the adapter holds in full were rounded to the base's dtype, \
             first `{}` ({}: {} of its values changed); --dtype f32 keeps them",
            rounded.len(),
            first.parameter,
            first.dtype,
            first.rounded
        ));
    }
    if realised.non_finite > 0 {
        warnings.push(format!(
            "warning: {} elements of the merged tensors are infinite or NaN",
            realised.non_finite
        ));
    }
    if let Some(warning) = impossible_warning(report) {
        warnings.push(warning);
    }
    warnings
}

/// All that was taken out, together.
fn recovered(report: &MergeReport) -> Option<Recovered> {
    let mut total = Recovered::default();
    for undone in report.targets.iter().filter_map(|target| target.undone.as_ref()) {
        total.add(undone);
    }
    (total.elements > 0).then_some(total)
}

fn recovered_line(report: &MergeReport) -> Option<String> {
    let total = recovered(report)?;
    let share = |part: u64| 100.0 * part as f64 / total.elements as f64;
    Some(format!(
        "taken out: if it was merged with this weight, {:.2} % of the changed elements are what they \
         were before, {:.2} % cannot be told from a neighbour{}",
        share(total.exact),
        share(total.ambiguous),
        match total.impossible {
            0 => String::new(),
            impossible => format!(", {:.2} % fit no value", share(impossible)),
        }
    ))
}

/// More than what another program's double rounding explains.
fn impossible_warning(report: &MergeReport) -> Option<String> {
    let total = recovered(report)?;
    (total.impossible * 200 > total.elements).then(|| {
        format!(
            "warning: {:.1} % of the elements are no result of merging this adapter with this \
             weight into any {} model: was it merged at all, and with this weight?",
            100.0 * total.impossible as f64 / total.elements as f64,
            report.targets.first().map_or("such", |target| target.dtype.name())
        )
    })
}

fn requantised_line(report: &MergeReport) -> Option<String> {
    let mut total = Realised::default();
    for requantised in report.targets.iter().filter_map(|target| target.requantised.as_ref()) {
        total.add(requantised);
    }
    let (kept, noise) = (total.projection()?, total.noise()?);
    Some(format!(
        "quantised again with the scales that it had, the model would keep {:.1} % of the delta, \
         with noise of {:.0} % of it",
        100.0 * kept,
        100.0 * noise
    ))
}

fn realised_line(realised: &Realised) -> Option<String> {
    Some(format!(
        "realised delta: {}, {:.1} % of the elements changed",
        survival(realised)?,
        100.0 * realised.changed_share()
    ))
}

/// "98.2 % of it survived rounding, with noise of 22 % of it".
fn survival(realised: &Realised) -> Option<String> {
    let noise = realised.noise()?;
    let noise = if noise < 1.0 {
        format!("noise of {:.1} % of it", 100.0 * noise)
    } else {
        format!("noise {noise:.1} times as large as it")
    };
    let survived = 100.0 * realised.projection()?;
    Some(format!("{survived:.1} % of it survived rounding, with {noise}"))
}

/// What rounding did to the adapter, where it was worst, and what helps, best first. Loud where the
/// adapter is damaged, a line where a good merge has the ordinary noise of a coarse dtype.
fn loss_warning(arguments: &MakeArguments, report: &MergeReport) -> String {
    let realised = &report.realised;
    let lost = 1.0 - realised.projection().unwrap_or(1.0);
    let noise = realised.noise().unwrap_or(0.0);
    let stochastic = arguments.engine.rounding == RoundingChoice::Stochastic;
    let mut poor: Vec<_> = report.targets.iter().filter(|t| t.realised.is_poor()).collect();
    let total = report.targets.len();
    if lost < 0.1 && noise < 0.5 {
        return format!(
            "note: the stored dtype is coarse beside the delta in {} of {total} targets (noise of \
             {:.0} % of the delta in all); --dtype f32 keeps it exactly",
            poor.len(),
            100.0 * noise
        );
    }
    let severity = |realised: &Realised| {
        let lost = (1.0 - realised.projection().unwrap_or(1.0)).abs();
        lost.max(realised.noise().unwrap_or(0.0))
    };
    poor.sort_by(|a, b| severity(&b.realised).total_cmp(&severity(&a.realised)));
    let mut text = if lost >= 0.1 {
        format!("warning: rounding LOST {:.0} % of the change", 100.0 * lost)
    } else {
        format!("warning: rounding drowned the change in noise {noise:.1} times as large as it")
    };
    text.push_str(&format!(
        ": in {} of {total} targets the delta is small beside the spacing of the stored values",
        poor.len()
    ));
    for target in poor.iter().take(3) {
        let survival = survival(&target.realised).unwrap_or_default();
        text.push_str(&format!("\n  {} ({}): {survival}", target.parameter, target.dtype));
    }
    let mut help = Vec::new();
    if poor.iter().any(|target| target.dtype != Dtype::F32) {
        help.push("--dtype f32 (keeps all of it)");
    }
    if poor.iter().any(|target| target.dtype == Dtype::Bf16) {
        help.push("--dtype f16 (8 times finer than bf16, if the model's values fit)");
    }
    help.push("serving the adapter unmerged");
    text.push_str(&format!("\n  what helps, best first: {}", help.join("; ")));
    if !stochastic {
        text.push_str(
            "\n  --rounding stochastic keeps the delta on average, at the price of noise that can \
             be several times the delta",
        );
    }
    text
}
