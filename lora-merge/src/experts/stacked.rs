//! Adapters of stacks (PEFT's `target_parameters`): which parameter each pair of factors is of,
//! how it lies there, and where the base has it.
//!
//! The files name the parameters of a module and nest the pairs, the first registered parameter
//! innermost, but do not say which pair is whose, nor which dimension A takes. Both are the same
//! in all layers. So all layers are asked which assignments and [`Side`]s fit every one of them:
//! gpt-oss' down projection is square, its gate and up projection is not.

use std::collections::{BTreeMap, BTreeSet};

use lora_format::Shape;
use lora_format::model::{Candidate, Experts, Note};

use super::base::{Matrices, Stored};
use super::evidence::{Evidence, Told};
use super::layout::{Layout, Packing, Side, Stacked};
use super::names::{self, Projection};
use super::{Context, Found, Lie};
use crate::error::PlanProblem;
use crate::low_rank::Stride;
use crate::names::numberless;
use crate::orientation::Orientation;
use crate::place::{Part, Placed};
use crate::resolve::{self, Wanted};

/// A module with the factors of its parameters, innermost first.
struct Module<'a> {
    name: &'a str,
    factors: Vec<(usize, &'a Experts)>,
    /// Where the base has the parameters that the configuration names.
    homes: BTreeMap<&'a str, Home>,
    /// Why it has others not.
    troubles: Vec<String>,
}

/// A parameter as the model has it in memory, and where the base stores it.
#[derive(Debug)]
struct Home {
    experts: usize,
    /// Of every expert's matrix.
    rows: usize,
    cols: usize,
    /// How the matrices lie in memory, where that is known.
    stored: Option<Orientation>,
    pieces: Vec<Piece>,
}

/// Rows of every expert's matrix, and where the base has them.
#[derive(Debug)]
struct Piece {
    /// The first.
    start: usize,
    /// How many.
    count: usize,
    place: Place,
    /// The rows that they are there.
    rows: Stride,
    transposed: bool,
}

/// Where the base has the matrices.
#[derive(Debug)]
enum Place {
    /// All in one parameter.
    Stack(usize),
    /// Each in its own, by expert.
    Each(Vec<usize>),
}

impl Home {
    /// Whether this is one matrix: PEFT adds B·A, whatever the release.
    fn is_one(&self) -> bool {
        self.experts == 1
    }

    fn side(&self, side: Side) -> Side {
        if self.is_one() { Side::Last } else { side }
    }

    /// The factors as those of this parameter, if their shapes are.
    fn fit(&self, form: &Experts, candidate: &Candidate, side: Side) -> Option<Stacked> {
        let ([all, a], [b, also]) = (form.a.shape.as_slice(), form.b.shape.as_slice()) else {
            return None;
        };
        let experts = self.experts;
        let rank = candidate.rank;
        if all != also || experts.checked_mul(rank) != Some(*all) || *all == 0 {
            return None;
        }
        let fits = match self.side(side) {
            Side::Last => (*b, *a) == (self.rows, self.cols),
            Side::First => (*a, *b) == (self.rows, self.cols),
        };
        fits.then_some(Stacked { experts, rank, a: *a, b: *b })
    }

    fn describe(&self) -> String {
        match self.experts {
            1 => format!("{}×{}", self.rows, self.cols),
            experts => format!("{experts} experts of {}×{}", self.rows, self.cols),
        }
    }
}

/// A reading of the files: the parameter of every pair of factors, and the side that A takes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reading<'a> {
    parameters: Vec<&'a str>,
    side: Side,
}

/// Places the factors of bare parameters, all of which are claimed.
pub(super) fn place(
    context: &Context<'_>,
    components: &[(usize, &str, &Experts)],
    found: &mut Found,
    problems: &mut Vec<PlanProblem>,
) {
    found.claimed.extend(components.iter().map(|entry| entry.0));
    // Modules that differ in their numbers alone are of one class.
    let mut kinds: BTreeMap<(String, usize), Vec<Module<'_>>> = BTreeMap::new();
    for module in modules(context, components, found, problems) {
        let kind = (numberless(module.name), module.factors.len());
        kinds.entry(kind).or_default().push(module);
    }
    for ((kind, _), modules) in kinds {
        if let Err(unfit) = place_kind(context, &kind, &modules, found) {
            problems.extend(unfit);
        }
    }
}

fn place_kind(
    context: &Context<'_>,
    kind: &str,
    modules: &[Module<'_>],
    found: &mut Found,
) -> Result<(), Vec<PlanProblem>> {
    let evidence = Evidence::of(context.contents);
    let only = |problem| vec![problem];
    let readings = readings(modules)?;
    let reading = settle(context, kind, modules, readings, evidence, found).map_err(only)?;
    let packings = packings(context, kind, modules, &reading, evidence, found).map_err(only)?;
    for module in modules {
        place_module(context, module, &reading, &packings, found);
    }
    Ok(())
}

/// The modules with what the base has of their parameters. One of which it has nothing is a
/// problem instead.
fn modules<'a>(
    context: &Context<'_>,
    components: &[(usize, &'a str, &'a Experts)],
    found: &mut Found,
    problems: &mut Vec<PlanProblem>,
) -> Vec<Module<'a>> {
    let mut by_name: BTreeMap<&'a str, Vec<(usize, &'a Experts)>> = BTreeMap::new();
    for &(component, module, form) in components {
        by_name.entry(module).or_default().push((component, form));
    }
    let mut wanted: Vec<Wanted<'a>> = Vec::new();
    by_name.retain(|&module, factors| {
        factors.sort_by_key(|(_, form)| form.depth);
        let names = named(factors);
        let problem = if factors.len() > MOST {
            format!("factors of {} nested parameters, of at most {MOST} known", factors.len())
        } else if names.len() > MOST_NAMED {
            format!(
                "`target_parameters` names {} of its parameters, of at most {MOST_NAMED} known",
                names.len()
            )
        } else {
            return true;
        };
        problems.push(PlanProblem::Experts { module: module.to_owned(), problem });
        false
    });
    for (&module, factors) in &by_name {
        let names = named(factors);
        let wanted_of = |parameter| Wanted { module, parameter, optional: true };
        wanted.extend(names.into_iter().map(wanted_of));
    }
    let resolution = resolve::resolve(&wanted, context.parameters);
    problems.extend(resolution.problems);
    for (rename, count) in resolution.renames {
        *found.renames.entry(rename).or_default() += count;
    }
    let mut wanted = wanted.into_iter().zip(resolution.found).peekable();
    let mut modules = Vec::with_capacity(by_name.len());
    for (name, factors) in by_name {
        let mut module = Module { name, factors, homes: BTreeMap::new(), troubles: Vec::new() };
        let mut missing = None;
        while let Some((one, index)) = wanted.next_if(|(one, _)| one.module == name) {
            let home = match index {
                Some(index) => direct(context, index).map(Some),
                None => elsewhere(context, name, one.parameter),
            };
            match home {
                Ok(Some(home)) => {
                    module.homes.insert(one.parameter, home);
                    if index.is_none() {
                        context.count(name, found);
                    }
                }
                Ok(None) => missing = missing.or(Some(one)),
                Err(trouble) => module.troubles.push(trouble),
            }
        }
        match missing {
            Some(one) if module.homes.is_empty() && module.troubles.is_empty() => {
                let one = Wanted { optional: false, ..one };
                problems.extend(resolve::resolve(&[one], context.parameters).problems);
            }
            _ => modules.push(module),
        }
    }
    modules
}

/// The parameters that the configuration names of a module with these factors.
fn named<'a>(factors: &[(usize, &'a Experts)]) -> BTreeSet<&'a str> {
    let candidates = factors.iter().flat_map(|(_, form)| &form.candidates);
    candidates.map(|candidate| candidate.parameter.as_str()).collect()
}

/// A parameter that the base has under the adapter's name.
fn direct(context: &Context<'_>, index: usize) -> Result<Home, String> {
    let parameter = context.parameters.get(index);
    let (experts, rows, cols) = match *parameter.shape.as_slice() {
        [rows, cols] => (1, rows, cols),
        [experts, rows, cols] => (experts, rows, cols),
        _ => {
            let shape = Shape(parameter.shape.clone());
            return Err(format!(
                "`{}` is {shape}, and factors are of parameters of two or three dimensions",
                parameter.name
            ));
        }
    };
    let stored = context.base.block_of(index).and_then(|block| block.orientation());
    let whole = Piece::whole(Place::Stack(index), rows, false);
    Ok(Home { experts, rows, cols, stored, pieces: vec![whole] })
}

/// A stack that the base has under another name, or matrix by matrix.
fn elsewhere(context: &Context<'_>, module: &str, parameter: &str) -> Result<Option<Home>, String> {
    let (Some(block), Some(projection)) = (context.block(module), names::of_parameter(parameter))
    else {
        return Ok(None);
    };
    let matrices = |projection| block.matrices(projection, context.parameters);
    if let Some(all) = matrices(projection)? {
        let Matrices { experts, rows, cols, .. } = all;
        return Ok(Some(match all.stored {
            Stored::Stack { parameter, as_in_memory: false, .. }
                if projection == Projection::GateUp =>
            {
                sorted(*parameter, all, block.orientation())?
            }
            Stored::Stack { parameter, .. } => {
                let pieces = vec![Piece::whole(Place::Stack(*parameter), rows, false)];
                Home { experts, rows, cols, stored: block.orientation(), pieces }
            }
            Stored::Each { parameters, .. } => {
                let each = Place::Each(parameters.values().copied().collect());
                // What unsloth takes apart is gpt-oss, E × in × out in memory.
                match matrices(Projection::GateUp)? {
                    Some(_) => Home {
                        experts,
                        rows: cols,
                        cols: rows,
                        stored: Some(Orientation::InOut),
                        pieces: vec![Piece::whole(each, cols, true)],
                    },
                    None => Home {
                        experts,
                        rows,
                        cols,
                        stored: Some(Orientation::OutIn),
                        pieces: vec![Piece::whole(each, rows, false)],
                    },
                }
            }
        }));
    }
    if projection != Projection::GateUp {
        return Ok(None);
    }
    match (matrices(Projection::Gate)?, matrices(Projection::Up)?) {
        (None, None) => Ok(None),
        (Some(gate), Some(up)) => joined(gate, up).map(Some),
        (gate, _) => {
            let missing = if gate.is_some() { Projection::Up } else { Projection::Gate };
            Err(format!("the base has no {} that goes with the other half", missing.name()))
        }
    }
}

impl Piece {
    fn whole(place: Place, count: usize, transposed: bool) -> Piece {
        Piece { start: 0, count, place, rows: Stride::ALL, transposed }
    }
}

/// Gate and up stored apart, joined in memory: the gate's outputs come first.
fn joined(gate: Matrices<'_>, up: Matrices<'_>) -> Result<Home, String> {
    let shape = |it: &Matrices<'_>| (it.experts, it.rows, it.cols);
    if shape(&gate) != shape(&up) {
        return Err(format!(
            "gate projections of {} experts of {}×{}, and up projections of {} of {}×{}",
            gate.experts, gate.rows, gate.cols, up.experts, up.rows, up.cols
        ));
    }
    let (experts, half, cols) = shape(&gate);
    let place = |it: &Matrices<'_>| match it.stored {
        Stored::Stack { parameter, .. } => Place::Stack(*parameter),
        Stored::Each { parameters, .. } => Place::Each(parameters.values().copied().collect()),
    };
    let piece = |it: &Matrices<'_>, start| Piece { start, ..Piece::whole(place(it), half, false) };
    let pieces = vec![piece(&gate, 0), piece(&up, half)];
    let rows = half.checked_mul(2).ok_or("the matrices are too large")?;
    Ok(Home { experts, rows, cols, stored: Some(Orientation::OutIn), pieces })
}

/// Gate and up stored in turn, sorted into halves in memory.
fn sorted(
    parameter: usize,
    all: Matrices<'_>,
    stored: Option<Orientation>,
) -> Result<Home, String> {
    let Matrices { experts, rows, cols, .. } = all;
    if rows % 2 != 0 || stored == Some(Orientation::InOut) {
        return Err(format!("{rows} rows of gate and up projections in turn"));
    }
    let half = rows / 2;
    let piece = |start: usize, first| Piece {
        start,
        rows: Stride { start: first, step: 2 },
        ..Piece::whole(Place::Stack(parameter), half, false)
    };
    let pieces = vec![piece(0, 0), piece(half, 1)];
    Ok(Home { experts, rows, cols, stored: Some(Orientation::OutIn), pieces })
}

/// More nested parameters of one module than this, or more that the configuration names, are of no
/// class that is known: a module of experts has two or three matrices, and their biases.
const MOST: usize = 4;
const MOST_NAMED: usize = 8;

/// The readings that fit all modules of a kind, of each side at most two: one is what is asked for,
/// and a second shows that there is more than one. If there are several, one in the order of
/// registration goes before those that are not.
///
/// # Errors
/// Every module that none fits.
fn readings<'a>(modules: &[Module<'a>]) -> Result<Vec<Reading<'a>>, Vec<PlanProblem>> {
    let mut common: Option<BySide<'a>> = None;
    let mut unfit = Vec::new();
    for module in modules {
        let mut own = Side::BOTH.map(|side| module.fitting(side));
        if let Some(common) = &common {
            for (own, common) in own.iter_mut().flatten().zip(common.iter().flatten()) {
                own.retain(|parameter| common.contains(parameter));
            }
        }
        if own.iter().all(|fitting| assignments(fitting, &|_| true).is_empty()) {
            unfit.push(module.unfit(common.is_some()));
        } else {
            common = Some(own);
        }
    }
    let common = match (common, unfit.is_empty()) {
        (Some(common), true) => common,
        _ => return Err(unfit),
    };
    // Of single matrices both sides are the same.
    let is_one = |parameter: &&str| {
        modules.iter().all(|module| module.homes.get(parameter).is_some_and(Home::is_one))
    };
    let readings = |accept: &dyn Fn(&[&'a str]) -> bool| -> Vec<Reading<'a>> {
        let sides = Side::BOTH.into_iter().zip(&common);
        sides
            .flat_map(|(side, fitting)| {
                let other =
                    |parameters: &[&'a str]| side == Side::Last || !parameters.iter().all(is_one);
                let found = assignments(fitting, &|all| other(all) && accept(all));
                found.into_iter().map(move |parameters| Reading { parameters, side })
            })
            .collect()
    };
    let ordered = readings(&|parameters| names::in_order(parameters.iter().copied()));
    Ok(if ordered.is_empty() { readings(&|_| true) } else { ordered })
}

/// The parameters that every pair of factors fits, innermost first, with either side.
type BySide<'a> = [Vec<Vec<&'a str>>; 2];

/// The first two of the ways to give each pair of factors a parameter of its own among those that
/// it fits.
fn assignments<'a>(
    fitting: &[Vec<&'a str>],
    accept: &dyn Fn(&[&'a str]) -> bool,
) -> Vec<Vec<&'a str>> {
    fn extend<'a>(
        fitting: &[Vec<&'a str>],
        taken: &mut Vec<&'a str>,
        accept: &dyn Fn(&[&'a str]) -> bool,
        found: &mut Vec<Vec<&'a str>>,
    ) {
        let Some((own, rest)) = fitting.split_first() else {
            if accept(taken) {
                found.push(taken.clone());
            }
            return;
        };
        for &parameter in own {
            if found.len() == 2 {
                return;
            }
            if !taken.contains(&parameter) {
                taken.push(parameter);
                extend(rest, taken, accept, found);
                taken.pop();
            }
        }
    }
    let mut found = Vec::new();
    extend(fitting, &mut Vec::new(), accept, &mut found);
    found
}

impl<'a> Module<'a> {
    fn candidate(form: &'a Experts, parameter: &str) -> Option<&'a Candidate> {
        form.candidates.iter().find(|candidate| candidate.parameter == parameter)
    }

    fn fit(&self, form: &'a Experts, parameter: &str, side: Side) -> Option<Stacked> {
        let candidate = Module::candidate(form, parameter)?;
        self.homes.get(parameter)?.fit(form, candidate, side)
    }

    /// The parameters that each pair of factors fits.
    fn fitting(&self, side: Side) -> Vec<Vec<&'a str>> {
        let fits = |form: &'a Experts, name: &str| self.fit(form, name, side).is_some();
        let of_form = |form| self.homes.keys().copied().filter(|name| fits(form, name)).collect();
        self.factors.iter().map(|(_, form)| of_form(form)).collect()
    }

    /// What was expected, and what was found.
    fn unfit(&self, together: bool) -> PlanProblem {
        let factors: Vec<String> = self
            .factors
            .iter()
            .map(|(_, form)| {
                let (a, b) = (Shape(form.a.shape.clone()), Shape(form.b.shape.clone()));
                format!("A {a} with B {b}")
            })
            .collect();
        let rank = |parameter: &str| {
            let mut forms = self.factors.iter();
            let candidate = forms.find_map(|(_, form)| Module::candidate(form, parameter));
            candidate.map_or(0, |candidate| candidate.rank)
        };
        let homes: Vec<String> = self
            .homes
            .iter()
            .map(|(name, home)| format!("`{name}` is {}, at rank {}", home.describe(), rank(name)))
            .chain(self.troubles.iter().cloned())
            .collect();
        let as_others = if together { " as in the layers before" } else { "" };
        let problem = format!(
            "the factors {} do not fit the base{as_others}: {}",
            factors.join(" and "),
            homes.join("; ")
        );
        PlanProblem::Experts { module: self.name.to_owned(), problem }
    }
}

/// One reading of those that fit: the user's, else what the configuration tells.
fn settle<'a>(
    context: &Context<'_>,
    kind: &str,
    modules: &[Module<'a>],
    mut readings: Vec<Reading<'a>>,
    evidence: Evidence<'_>,
    found: &mut Found,
) -> Result<Reading<'a>, PlanProblem> {
    let is_open = |readings: &[Reading<'_>]| readings.iter().any(|it| it.side != readings[0].side);
    if is_open(&readings) {
        let stored = stored(modules);
        let told = evidence.side(stored, context.model);
        let (side, by) = match (context.layout, told) {
            (Some(layout), told) => {
                let what = layout.side(stored);
                let against = told.filter(|told| told.what != what);
                (
                    what,
                    against.map(|told| format!("--moe-layout {layout} asks, though {}", told.by)),
                )
            }
            (None, Some(Told { what, by })) => (what, Some(by)),
            (None, None) => {
                let open = "the shapes fit A with the experts' inputs as well as with their \
                            outputs, and the files do not say which it has";
                return Err(refusal(kind, open));
            }
        };
        readings.retain(|reading| reading.side == side);
        found.notes.extend(by.map(|evidence| Note::ExpertLayout {
            module: kind.to_owned(),
            reading: format!("A has {}", side.of(stored)),
            evidence,
        }));
    }
    match <[Reading<'a>; 1]>::try_from(readings) {
        Ok([only]) => Ok(only),
        Err(several) => {
            let ways: Vec<String> =
                several.iter().map(|reading| reading.parameters.join(", ")).collect();
            Err(PlanProblem::Experts {
                module: kind.to_owned(),
                problem: format!(
                    "the factors fit its parameters in more than one order (such as {}), and which the \
                     module registered first is not known",
                    ways.join(" and ")
                ),
            })
        }
    }
}

/// How the experts of these modules lie in memory, if they all agree.
fn stored(modules: &[Module<'_>]) -> Option<Orientation> {
    let homes = modules.iter().flat_map(|module| module.homes.values());
    let mut known = homes.filter(|home| !home.is_one()).filter_map(|home| home.stored);
    let first = known.next()?;
    known.all(|other| other == first).then_some(first)
}

/// Which columns of B are whose, by parameter.
fn packings<'a>(
    context: &Context<'_>,
    kind: &str,
    modules: &[Module<'a>],
    reading: &Reading<'a>,
    evidence: Evidence<'_>,
    found: &mut Found,
) -> Result<BTreeMap<&'a str, Packing>, PlanProblem> {
    let mut packings = BTreeMap::new();
    for (position, &parameter) in reading.parameters.iter().enumerate() {
        let matters = modules.iter().any(|module| {
            let form = module.factors[position].1;
            let stacked = module.fit(form, parameter, reading.side);
            stacked.is_some_and(|stacked| stacked.experts > 1 && stacked.rank > 1)
        });
        let told = evidence.packing(parameter);
        let (packing, by) = match (context.layout.map(Layout::packing), told) {
            _ if !matters => (Packing::RankMajor, None),
            (Some(packing), told) => {
                let marker = evidence.marker(parameter);
                let against = marker.filter(|_| told != Ok(packing));
                let by =
                    |marker| format!("--moe-layout asks, though `lora_B_layout` is {marker:?}");
                (packing, against.map(by))
            }
            (None, Ok(packing)) => {
                let told =
                    (packing != Packing::RankMajor).then(|| "`lora_B_layout` says".to_owned());
                (packing, told)
            }
            (None, Err(open)) => return Err(refusal(kind, &open)),
        };
        packings.insert(parameter, packing);
        found.notes.extend(by.map(|evidence| Note::ExpertLayout {
            module: format!("{kind}.{parameter}"),
            reading: match packing {
                Packing::RankMajor => "B has its columns by rank, then by expert".to_owned(),
                Packing::Blocks => "B has its columns by expert, then by rank".to_owned(),
            },
            evidence,
        }));
    }
    Ok(packings)
}

fn refusal(kind: &str, open: &str) -> PlanProblem {
    let names: Vec<&str> = Layout::ALL.into_iter().map(Layout::name).collect();
    PlanProblem::ExpertLayout {
        module: kind.to_owned(),
        open: open.to_owned(),
        layouts: names.join(", "),
    }
}

fn place_module(
    context: &Context<'_>,
    module: &Module<'_>,
    reading: &Reading<'_>,
    packings: &BTreeMap<&str, Packing>,
    found: &mut Found,
) {
    for (&(component, form), &parameter) in module.factors.iter().zip(&reading.parameters) {
        let (Some(stacked), Some(candidate), Some(home), Some(&packing)) = (
            module.fit(form, parameter, reading.side),
            Module::candidate(form, parameter),
            module.homes.get(parameter),
            packings.get(parameter),
        ) else {
            // The reading fits all modules.
            continue;
        };
        let (side, scale) = (home.side(reading.side), candidate.scaling.scale(candidate.rank));
        for (number, piece) in home.pieces.iter().enumerate() {
            let terms = (0..home.experts).map(|expert| {
                let pair = stacked.expert(expert, packing, side);
                let pair = pair.some_rows(piece.start, piece.count);
                let again = (number > 0).then_some(pair.cols.factor);
                let lie = Lie { rows: piece.rows, transposed: piece.transposed, again };
                pair.term((context.adapter, component), scale, lie)
            });
            let place = |parameter, count, terms| Placed {
                adapter: context.adapter,
                component,
                parameter: Some(parameter),
                part: Part::Slabs { count, terms },
            };
            match &piece.place {
                Place::Stack(parameter) => {
                    let terms = terms.enumerate().collect();
                    found.placed.push(place(*parameter, home.experts, terms));
                }
                Place::Each(parameters) => {
                    let each = parameters.iter().zip(terms);
                    let each = each.map(|(parameter, term)| place(*parameter, 1, vec![(0, term)]));
                    found.placed.extend(each);
                }
            }
        }
    }
}
