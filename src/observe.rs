//! Logs: to stderr, one line per event, RFC 3339 times, nothing in them that a
//! terminal or a log reader would take for something else.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _, Write},
};

use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

/// The environment variable that sets what is logged, as `RUST_LOG` does elsewhere.
pub const FILTER_VARIABLE: &str = "DISPATCHER_LOG";

/// The log target of audit records.
pub const AUDIT_TARGET: &str = "audit";

/// What is logged when the variable doesn't say. The audit records always are,
/// unless the variable names their target.
const DEFAULT_FILTER: &str = "info";

/// Starts logging for this process; a second call changes nothing.
pub fn init() {
    let wanted = std::env::var(FILTER_VARIABLE).unwrap_or_default();
    let (filter, complaint) = filter(&wanted);
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(Stderr)
        .with_ansi(false)
        .finish();
    if tracing::subscriber::set_global_default(subscriber).is_ok() {
        if let Some(complaint) = complaint {
            tracing::warn!(variable = FILTER_VARIABLE, %complaint, "the log filter is not understood");
        }
        tracing::debug!(terminal = io::stderr().is_terminal(), "logging starts");
    }
}

fn filter(wanted: &str) -> (EnvFilter, Option<String>) {
    let wanted = if wanted.is_empty() { DEFAULT_FILTER } else { wanted };
    // The target itself, not what merely has its name within: "dispatcher::audit".
    let names_it = |directive: &str| {
        let target = directive.split(['=', '[']).next().unwrap_or_default();
        target.trim() == AUDIT_TARGET
    };
    let with_audit = if wanted.split(',').any(names_it) {
        wanted.to_owned()
    } else {
        format!("{wanted},{}=info", AUDIT_TARGET)
    };
    match EnvFilter::try_new(&with_audit) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new(DEFAULT_FILTER), Some(error.to_string())),
    }
}

/// Replaces what could end a line, move a cursor or turn the direction of text
/// by its escaped form; `limit` bounds the bytes that are looked at.
#[must_use]
pub fn printable(text: &str, limit: usize) -> String {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut shown = escape(&text[..end]);
    if end < text.len() {
        shown.push('…');
    }
    shown
}

fn escape(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if is_control(character) {
            // Writing to a String does not fail.
            let _ = write!(shown, "{}", character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// Controls of every kind: C0, C1, and Unicode's for lines and direction.
fn is_control(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}'
        )
}

/// Writes each event escaped, whatever put a control character into it.
struct Stderr;

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = Line<io::Stderr>;

    fn make_writer(&'a self) -> Self::Writer {
        Line(io::stderr())
    }
}

/// One formatted event comes in with one write.
struct Line<W>(W);

impl<W: Write> Write for Line<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let body = text.strip_suffix('\n').unwrap_or(&text);
        let mut line = escape(body);
        line.push('\n');
        self.0.write_all(line.as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_moves_a_cursor_or_forges_a_line() {
        assert_eq!(printable("plain ä 漢", 100), "plain ä 漢");
        assert_eq!(printable("a\nb\x1b[2J\u{9b}\u{202e}", 100), "a\\nb\\u{1b}[2J\\u{9b}\\u{202e}");
        assert_eq!(printable("äää", 3), "ä…");
        let mut out = Vec::new();
        Line(&mut out).write_all(b"first\nsecond\r\n").unwrap();
        assert_eq!(out, b"first\\nsecond\\r\n");
    }

    #[test]
    fn audit_records_stay_unless_named() {
        assert!(filter("warn").0.to_string().contains("audit=info"));
        assert!(!filter("info,audit=off").0.to_string().contains("audit=info"));
        assert!(filter("warn,dispatcher::audit=debug").0.to_string().contains(",audit=info"));
        assert!(filter("").1.is_none());
        assert!(filter("=x=y=").1.is_some());
    }
}
