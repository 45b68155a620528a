//! What is wrong in a file, where, and what to write instead.

use std::{
    fmt,
    io::{self, Write},
    path::Path,
    sync::Arc,
};

/// Longest piece of someone's text that a message repeats, in characters.
const QUOTED_MAX: usize = 60;

/// Where a value was written. Ordered as people read: by file, line, column.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// Nowhere: it is a default of the program's own.
    BuiltIn,
    /// In a file.
    File {
        /// Its path, as it was given.
        file: Arc<Path>,
        /// From 1.
        line: u32,
        /// From 1, in characters.
        column: u32,
    },
    /// In an environment variable of this name.
    Variable(&'static str),
    /// On the command line, by this flag.
    Flag(&'static str),
}

impl Place {
    /// The first character of `file`: for faults of the file as a whole.
    #[must_use]
    pub fn start_of(file: &Path) -> Self {
        Self::File { file: file.into(), line: 1, column: 1 }
    }

    /// Whether somebody wrote it, in whatever way.
    #[must_use]
    pub fn is_written(&self) -> bool {
        *self != Self::BuiltIn
    }

    /// The file, if it is in one.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::File { file, .. } => Some(file),
            _ => None,
        }
    }
}

/// `FILE:LINE`, `built-in`, `$VARIABLE` or `--flag`.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuiltIn => f.write_str("built-in"),
            Self::File { file, line, .. } => write!(f, "{}:{line}", printable(file)),
            Self::Variable(name) => write!(f, "${name}"),
            Self::Flag(name) => f.write_str(name),
        }
    }
}

/// A value and where it was written.
#[derive(Clone, Debug, PartialEq)]
pub struct At<T> {
    /// The value.
    pub value: T,
    /// Where it comes from.
    pub place: Place,
}

impl<T> At<T> {
    /// A value of the program's own.
    pub const fn built_in(value: T) -> Self {
        Self { value, place: Place::BuiltIn }
    }
}

/// One thing that is wrong, or (as a warning) surprising.
///
/// Shown as `FILE:LINE:COLUMN: message; help`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    /// Where.
    pub place: Place,
    /// What is wrong; no full stop.
    pub message: String,
    /// What to write instead; no full stop.
    pub help: String,
}

impl Fault {
    /// A fault at `place`.
    #[must_use]
    pub fn new(place: &Place, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { place: place.clone(), message: message.into(), help: help.into() }
    }

    /// A fault of a file as a whole, shown at its first character.
    #[must_use]
    pub fn of_file(file: &Path, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self::new(&Place::start_of(file), message, help)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.place)?;
        if let Place::File { column, .. } = self.place {
            write!(f, ":{column}")?;
        }
        write!(f, ": {}; {}", self.message, self.help)
    }
}

/// Sorts faults by place and drops repetitions: what two files inherit from a
/// third is wrong only once.
#[must_use]
pub fn tidy(mut faults: Vec<Fault>) -> Vec<Fault> {
    faults.sort();
    faults.dedup();
    faults
}

/// Writes each on a line of its own, `prefix` before its message.
///
/// # Errors
/// Those of `to`.
pub fn tell(faults: &[Fault], prefix: &str, to: &mut dyn Write) -> io::Result<()> {
    for fault in faults {
        let message = format!("{prefix}{}", fault.message);
        writeln!(to, "{}", Fault { message, ..fault.clone() })?;
    }
    Ok(())
}

/// Somebody's text, quoted, without control characters, and cut where it is long.
#[must_use]
pub fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTED_MAX) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// A path on one line, whatever is in it.
#[must_use]
pub fn printable(path: &Path) -> String {
    path.display().to_string().replace(char::is_control, "?")
}

/// Completes the sentence "NAME isn't known; …": the nearest of `known`, or all
/// of them where they are few.
#[must_use]
pub fn did_you_mean<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    const FEW: usize = 16;
    let known: Vec<&str> = known.into_iter().collect();
    if let Some(best) = nearest(given, &known) {
        return format!("did you mean {best:?}?");
    }
    if known.len() > FEW {
        return "check its spelling".to_owned();
    }
    if known.is_empty() {
        return "leave it out".to_owned();
    }
    let all: Vec<String> = known.iter().map(|name| format!("{name:?}")).collect();
    format!("write one of {}", all.join(", "))
}

fn nearest<'a>(given: &str, known: &[&'a str]) -> Option<&'a str> {
    // Longer texts are no misspelling of anything, and the distance is quadratic.
    const LONGEST: usize = 64;
    if given.len() > LONGEST {
        return None;
    }
    let given = given.to_lowercase();
    let allowed = 1 + given.chars().count() / 4;
    known
        .iter()
        .map(|name| (distance(&given, &name.to_lowercase()), *name))
        .filter(|(distance, _)| *distance <= allowed)
        .min()
        .map(|(_, name)| name)
}

/// How many letters to insert, delete, replace or swap with their neighbour.
fn distance(from: &str, to: &str) -> usize {
    let from: Vec<char> = from.chars().collect();
    let to: Vec<char> = to.chars().collect();
    // rows[i][j]: from the first i letters of one to the first j of the other.
    let row = |i| (0..=to.len()).map(|j| if i == 0 { j } else { i }).collect();
    let mut rows: Vec<Vec<usize>> = (0..=from.len()).map(row).collect();
    for i in 1..=from.len() {
        for j in 1..=to.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(from[i - 1] != to[j - 1]);
            rows[i][j] = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1] {
                rows[i][j] = rows[i][j].min(rows[i - 2][j - 2] + 1);
            }
        }
    }
    rows[from.len()][to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shown_as_file_line_column_message_help() {
        let place = Place::File { file: Path::new("a.toml").into(), line: 3, column: 7 };
        assert_eq!(Fault::new(&place, "wrong", "right").to_string(), "a.toml:3:7: wrong; right");
        assert_eq!(place.to_string(), "a.toml:3");
        let flag = Fault::new(&Place::Flag("--listen"), "wrong", "right");
        assert_eq!(flag.to_string(), "--listen: wrong; right");
    }

    #[test]
    fn the_nearest_name_is_suggested() {
        assert_eq!(did_you_mean("memroy", ["memory", "pids"]), "did you mean \"memory\"?");
        assert_eq!(did_you_mean("Memory", ["memory", "pids"]), "did you mean \"memory\"?");
        assert_eq!(did_you_mean("xyzzy", ["memory", "pids"]), "write one of \"memory\", \"pids\"");
        assert_eq!(did_you_mean(&"x".repeat(1 << 20), ["a"; 99]), "check its spelling");
    }

    #[test]
    fn quoted_text_is_short_and_has_no_control_characters() {
        assert_eq!(quoted("a\u{1b}[31m"), "\"a\\u{1b}[31m\"");
        assert_eq!(quoted(&"ä".repeat(100)).chars().count(), 63);
        assert_eq!(printable(Path::new("a\nb")), "a?b");
    }

    #[test]
    fn repeated_faults_are_told_once_and_in_order() {
        let fault = |line| {
            let place = Place::File { file: Path::new("a").into(), line, column: 1 };
            Fault::new(&place, "m", "h")
        };
        assert_eq!(tidy(vec![fault(10), fault(9), fault(10)]), [fault(9), fault(10)]);
    }
}
