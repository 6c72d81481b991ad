//! How the user says which ranks are wanted: what every command takes that chooses them.

use std::str::FromStr;

use clap::Args;
use lora_merge::rank::{RankError, RankLimits, RankPolicy, RankRules};

use crate::failure::Failure;

/// One policy for all matrices, or one budget; limits and exceptions.
#[derive(Debug, Args)]
#[command(next_help_heading = "Ranks (one policy is needed)")]
pub(crate) struct RankArguments {
    /// This rank; auto is as many as stand out of the noise, a heuristic
    #[arg(long, value_name = "N|auto", allow_negative_numbers = true)]
    rank: Option<String>,
    /// The smallest rank with this share of each change's energy, 0.95 for instance
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    energy: Option<f64>,
    /// The smallest rank with this relative error, 0.1 for instance
    #[arg(long, value_name = "ERROR", allow_negative_numbers = true)]
    tolerance: Option<f64>,
    /// What all factors together may take, such as 50MB: ranks go where they gain most per byte
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    budget: Option<ByteCount>,
    /// kohya's sv_ratio: values above the largest divided by this
    #[arg(long, value_name = "RATIO", alias = "sv_ratio", allow_negative_numbers = true)]
    sv_ratio: Option<f64>,
    /// kohya's sv_fro: the smallest rank with this share of the Frobenius norm
    #[arg(long, value_name = "SHARE", alias = "sv_fro", allow_negative_numbers = true)]
    sv_fro: Option<f64>,
    /// kohya's sv_cumulative: the smallest rank with this share of the sum of singular values
    #[arg(long, value_name = "SHARE", alias = "sv_cumulative", allow_negative_numbers = true)]
    sv_cumulative: Option<f64>,
    /// A tolerance and a budget's gains are relative to the base's weights, not to the changes
    #[arg(long)]
    relative: bool,
    /// At least this rank
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    min_rank: Option<usize>,
    /// At most this rank
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max_rank: Option<usize>,
    /// Another policy for modules that match: 'q_proj=32', '.*\.mlp\..*=energy:0.9,max:64',
    /// 'lm_head=skip'; the first that matches decides
    #[arg(long, value_name = "PATTERN=POLICY")]
    rank_for: Vec<String>,
}

/// What the user chose.
#[derive(Debug)]
pub(crate) enum RankChoice {
    /// Every matrix by itself.
    PerTensor(Box<RankRules>),
    /// All together.
    Budget {
        /// What the factors may take.
        bytes: u64,
        /// What every rank must keep to.
        limits: RankLimits,
    },
}

impl RankArguments {
    /// Whether a tolerance and a budget's gains are relative to ‖W₀‖_F rather than to ‖ΔW‖_F.
    pub(crate) fn relative(&self) -> bool {
        self.relative
    }

    /// Whether any option of these is given.
    pub(crate) fn is_given(&self) -> bool {
        let limits = self.min_rank.is_some() || self.max_rank.is_some();
        let numbers = [self.energy, self.tolerance, self.sv_ratio, self.sv_fro, self.sv_cumulative];
        let policy = self.rank.is_some() || self.budget.is_some();
        policy || limits || !self.rank_for.is_empty() || numbers.iter().any(Option::is_some)
    }

    /// Every option and its value; none is an empty text.
    pub(crate) fn settings(&self) -> Vec<(&'static str, String)> {
        fn text<T: ToString>(value: Option<T>) -> String {
            value.map(|value| value.to_string()).unwrap_or_default()
        }
        vec![
            ("rank", text(self.rank.as_deref())),
            ("energy", text(self.energy)),
            ("tolerance", text(self.tolerance)),
            ("budget", text(self.budget.map(|budget| format!("{} bytes", budget.0)))),
            ("sv-ratio", text(self.sv_ratio)),
            ("sv-fro", text(self.sv_fro)),
            ("sv-cumulative", text(self.sv_cumulative)),
            ("relative", self.relative.to_string()),
            ("min-rank", text(self.min_rank)),
            ("max-rank", text(self.max_rank)),
            ("rank-for", self.rank_for.join(" ")),
        ]
    }

    /// The choice, if there is exactly one and it makes sense.
    pub(crate) fn choose(&self) -> Result<RankChoice, Failure> {
        let limits = RankLimits { minimum: self.min_rank.unwrap_or(0), maximum: self.max_rank };
        if let Some(maximum) = self.max_rank
            && (maximum == 0 || maximum < limits.minimum)
        {
            let message = match maximum {
                0 => "--max-rank 0 leaves nothing".to_owned(),
                _ => format!("--min-rank {} is above --max-rank {maximum}", limits.minimum),
            };
            return Err(Failure::new(message, None));
        }
        let number = |value: Option<f64>, policy: fn(f64) -> RankPolicy| value.map(policy);
        let rank = self.rank.as_deref().map(named).transpose()?;
        let policies = [
            rank,
            number(self.energy, RankPolicy::Energy),
            number(self.tolerance, RankPolicy::Tolerance),
            number(self.sv_ratio, RankPolicy::SvRatio),
            number(self.sv_fro, RankPolicy::SvFro),
            number(self.sv_cumulative, RankPolicy::SvCumulative),
        ];
        let mut policies = policies.into_iter().flatten();
        match (policies.next(), self.budget, policies.next()) {
            (None, None, _) => Err(Failure::new(
                "nothing says which ranks are wanted",
                Some(
                    "give one of --rank N, --rank auto, --energy, --tolerance, --budget, \
                     --sv-ratio, --sv-fro and --sv-cumulative",
                ),
            )),
            (Some(policy), None, None) => {
                let rules = self.rank_for.iter().map(String::as_str);
                let rules = RankRules::new(policy, limits, rules).map_err(failure)?;
                Ok(RankChoice::PerTensor(Box::new(rules)))
            }
            (None, Some(_), _) if !self.rank_for.is_empty() => Err(Failure::new(
                "a budget chooses all ranks itself, and --rank-for sets others",
                Some("bound them with --min-rank and --max-rank, or give a policy"),
            )),
            (None, Some(ByteCount(bytes)), _) => Ok(RankChoice::Budget { bytes, limits }),
            _ => Err(Failure::new(
                "several options say which ranks are wanted",
                Some(
                    "give one of them; --min-rank and --max-rank bound it, --rank-for sets \
                     exceptions",
                ),
            )),
        }
    }
}

/// `--rank`: a number or `auto`, not the name of another policy.
fn named(text: &str) -> Result<RankPolicy, Failure> {
    match text.parse().map_err(failure)? {
        policy @ (RankPolicy::Rank(_) | RankPolicy::Auto) => Ok(policy),
        _ => Err(Failure::new(
            format!("--rank {text}: it is neither a rank nor auto"),
            Some("other policies have options of their own: --energy 0.95"),
        )),
    }
}

fn failure(error: RankError) -> Failure {
    let hint = match &error {
        RankError::Syntax { .. } => Some(
            "policies are 16, auto, energy:0.95, tolerance:0.1, sv_ratio:2, sv_fro:0.9 and \
             sv_cumulative:0.9; a rule adds min:N and max:N with commas, or is skip",
        ),
        _ => None,
    };
    Failure::new(error.to_string(), hint)
}

/// A number of bytes with an optional decimal or binary unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ByteCount(u64);

impl FromStr for ByteCount {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<ByteCount, &'static str> {
        const UNITS: [(&str, f64); 7] = [
            ("KIB", 1024.0),
            ("MIB", 1_048_576.0),
            ("GIB", 1_073_741_824.0),
            ("KB", 1e3),
            ("MB", 1e6),
            ("GB", 1e9),
            ("B", 1.0),
        ];
        let upper = text.trim().to_ascii_uppercase();
        let (number, unit) = UNITS
            .iter()
            .find_map(|(name, unit)| Some((upper.strip_suffix(name)?, *unit)))
            .unwrap_or((&upper, 1.0));
        let number: f64 = number.trim().parse().map_err(|_| "expected a size such as 50MB")?;
        let bytes = number * unit;
        if (1.0..=1e18).contains(&bytes) {
            Ok(ByteCount(bytes as u64))
        } else {
            Err("out of range")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_decimal_and_binary_units() {
        for (text, bytes) in [
            ("50MB", 50_000_000),
            ("50 mb", 50_000_000),
            ("1.5KiB", 1536),
            ("2GiB", 2 << 30),
            ("1GB", 1_000_000_000),
            ("3MiB", 3 << 20),
            ("7kb", 7000),
            ("123", 123),
            ("9B", 9),
        ] {
            assert_eq!(text.parse(), Ok(ByteCount(bytes)), "{text}");
        }
        for text in ["", "MB", "-1MB", "0", "NaN", "inf", "1e30", "5 miles"] {
            assert!(text.parse::<ByteCount>().is_err(), "{text}");
        }
    }
}
