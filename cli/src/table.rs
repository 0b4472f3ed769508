//! Columns of text for people: left-aligned words, right-aligned numbers, no borders.

/// Rows under a header.
pub struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(header: &[&str]) -> Self {
        Self { header: header.iter().map(|h| (*h).to_owned()).collect(), rows: Vec::new() }
    }

    /// Adds a row of as many cells as the header has.
    pub fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.header.len(), "one cell for each column");
        self.rows.push(cells);
    }

    /// The table, indented; or `empty`.
    pub fn render(&self, empty: &str) -> String {
        if self.rows.is_empty() {
            return format!("  {empty}\n");
        }
        let width = |column: usize| {
            let cells = std::iter::once(&self.header).chain(&self.rows);
            cells.map(|row| row[column].chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.header.len()).map(width).collect();
        let numeric: Vec<bool> = (0..self.header.len())
            .map(|column| self.rows.iter().all(|row| is_number(&row[column])))
            .collect();
        let mut out = String::new();
        for row in std::iter::once(&self.header).chain(&self.rows) {
            let mut line = String::from(" ");
            for (column, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths[column] - cell.chars().count());
                line.push(' ');
                if numeric[column] {
                    line.push_str(&pad);
                }
                line.push_str(cell);
                if !numeric[column] {
                    line.push_str(&pad);
                }
                line.push(' ');
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// `12`, `1.5`, `3.0 MiB`, `4/9`, `80 %`, `-`.
fn is_number(cell: &str) -> bool {
    cell == "-" || cell.starts_with(|c: char| c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stand_left_and_numbers_right() {
        let mut table = Table::new(&["id", "n"]);
        table.row(vec!["a".to_owned(), "1".to_owned()]);
        table.row(vec!["bcd".to_owned(), "1000".to_owned()]);
        assert_eq!(table.render(""), "  id      n\n  a       1\n  bcd  1000\n");
        assert_eq!(Table::new(&["id"]).render("none"), "  none\n");
    }
}
