//! Numbers for people: summaries, and tables as aligned text or Markdown.

/// The two numbers reported of several runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Summary {
    pub(crate) minimum: f64,
    pub(crate) median: f64,
}

impl Summary {
    /// NaN if there are no values.
    pub(crate) fn of(values: &[f64]) -> Summary {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        let median = (at(sorted.len() / 2) + at(sorted.len().saturating_sub(1) / 2)) / 2.0;
        Summary { minimum: at(0), median }
    }
}

/// Rows of cells under a heading.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(heading: &[&str]) -> Table {
        Table { rows: vec![heading.iter().map(|&cell| cell.to_owned()).collect()] }
    }

    pub(crate) fn push(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// The first column to the left, the others to the right.
    pub(crate) fn render(&self, markdown: bool) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let cell = |row: &Vec<String>, column: usize| row.get(column).cloned().unwrap_or_default();
        let width = |column| {
            self.rows.iter().map(|row| cell(row, column).chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for (number, row) in self.rows.iter().enumerate() {
            let cells: Vec<String> = widths
                .iter()
                .enumerate()
                .map(|(column, &width)| match column {
                    0 => format!("{:<width$}", cell(row, column)),
                    _ => format!("{:>width$}", cell(row, column)),
                })
                .collect();
            if markdown {
                text += &format!("| {} |\n", cells.join(" | "));
                if number == 0 {
                    text += "|---|";
                    text += &"---:|".repeat(columns.saturating_sub(1));
                    text.push('\n');
                }
            } else {
                text += cells.join("  ").trim_end();
                text.push('\n');
            }
        }
        text
    }
}
