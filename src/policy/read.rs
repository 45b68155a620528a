//! Strict reading of TOML: every value with its place, every fault at once,
//! every key that nobody asked for an error.
//!
//! serde stops at the first fault; this walks the parsed document instead.
//! Used for policy files and for the server's own file.

use std::{ops::Range, path::Path, sync::Arc};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::fault::{At, Fault, Place, did_you_mean, quoted};

/// Most unknown keys told of one table, one by one.
const UNKNOWN_KEYS_MAX: usize = 100;

/// Most syntax faults told of one file.
const SYNTAX_FAULTS_MAX: usize = 20;

/// A file's text, and where its lines begin.
#[derive(Debug)]
pub struct Source {
    file: Arc<Path>,
    text: String,
    line_starts: Vec<usize>,
    built_in: bool,
}

impl Source {
    /// The text of `file`.
    #[must_use]
    pub fn new(file: &Path, text: String) -> Self {
        let breaks = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let line_starts = std::iter::once(0).chain(breaks.map(|(at, _)| at + 1)).collect();
        Self { file: file.into(), text, line_starts, built_in: false }
    }

    /// Text that is part of the program: its values have no place in a file.
    #[must_use]
    pub fn built_in(text: &str) -> Self {
        Self { built_in: true, ..Self::new(Path::new("built-in"), text.to_owned()) }
    }

    /// The file's path.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Reads the whole text. `read` is given the outermost table, and what it
    /// doesn't ask for is a fault. `None` where the text isn't TOML at all.
    pub fn read<T>(
        &self,
        faults: &mut Vec<Fault>,
        read: impl FnOnce(&mut Table<'_>, &mut Vec<Fault>) -> T,
    ) -> Option<T> {
        let (document, errors) = DeTable::parse_recoverable(&self.text);
        if errors.is_empty() {
            let mut table = Table::new(self, String::new(), document.get_ref());
            let value = read(&mut table, faults);
            table.finish(faults);
            return Some(value);
        }
        faults.extend(errors.iter().take(SYNTAX_FAULTS_MAX).map(|error| {
            let message = error.message().lines().collect::<Vec<_>>().join(", ");
            let span = error.span().unwrap_or(self.text.len()..self.text.len());
            Fault::new(
                &self.place(&span),
                format!("not valid TOML: {message}"),
                "mend the syntax (see toml.io)",
            )
        }));
        None
    }

    fn place(&self, span: &Range<usize>) -> Place {
        if self.built_in {
            return Place::BuiltIn;
        }
        let line = self.line_starts.partition_point(|start| *start <= span.start).max(1);
        let start = self.line_starts[line - 1];
        let before = self.text.get(start..span.start).unwrap_or_default();
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Place::File {
            file: Arc::clone(&self.file),
            line: number(line),
            column: number(before.chars().count() + 1),
        }
    }
}

/// A table being read. Keys are taken one by one; what is left is unknown.
pub struct Table<'a> {
    source: &'a Source,
    path: String,
    entries: &'a DeTable<'a>,
    known: Vec<&'static str>,
    any_key: bool,
    /// Keys that exist, maybe elsewhere: name and table.
    elsewhere: Vec<(&'static str, &'static str)>,
}

impl<'a> Table<'a> {
    fn new(source: &'a Source, path: String, entries: &'a DeTable<'a>) -> Self {
        Self { source, path, entries, known: Vec::new(), any_key: false, elsewhere: Vec::new() }
    }

    /// The value of `key`, if it is given.
    pub fn take(&mut self, key: &'static str) -> Option<Item<'a>> {
        self.known.push(key);
        let value = self.entries.get(key)?;
        Some(Item { source: self.source, key: join(&self.path, key), value })
    }

    /// Reads the table `key` within this one; `key` empty means this one.
    pub fn section<T>(
        &mut self,
        key: &'static str,
        faults: &mut Vec<Fault>,
        read: impl FnOnce(&mut Table<'_>, &mut Vec<Fault>) -> T,
    ) -> Option<T> {
        if key.is_empty() {
            return Some(read(self, faults));
        }
        let elsewhere = self.elsewhere.clone();
        self.take(key)?.table(faults, |table, faults| {
            table.elsewhere = elsewhere;
            read(table, faults)
        })
    }

    /// Every entry, for tables whose keys are anything; sorted by place.
    pub fn take_all(&mut self) -> Vec<(At<&'a str>, Item<'a>)> {
        self.any_key = true;
        self.entries()
    }

    fn entries(&self) -> Vec<(At<&'a str>, Item<'a>)> {
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        let describe = |(key, value): (&'a Spanned<_>, &'a Spanned<DeValue<'a>>)| {
            let name: &'a std::borrow::Cow<'a, str> = key.get_ref();
            let at = At { value: &**name, place: self.source.place(&key.span()) };
            (at, Item { source: self.source, key: join(&self.path, name), value })
        };
        entries.into_iter().map(describe).collect()
    }

    /// Tells which keys exist in which tables, for the help that goes with an
    /// unknown key. Passed on to tables within.
    pub fn keys_elsewhere(&mut self, keys: impl IntoIterator<Item = (&'static str, &'static str)>) {
        self.elsewhere.extend(keys);
    }

    fn finish(self, faults: &mut Vec<Fault>) {
        if self.any_key {
            return;
        }
        let mut unknown = self.entries();
        unknown.retain(|(key, _)| !self.known.contains(&key.value));
        let within =
            if self.path.is_empty() { String::new() } else { format!(" in [{}]", self.path) };
        for (key, item) in unknown.iter().take(UNKNOWN_KEYS_MAX) {
            let what = if item.is_table() { "table" } else { "key" };
            let message = format!("unknown {what} {}{within}", quoted(key.value));
            faults.push(Fault::new(&key.place, message, self.help_with(key.value)));
        }
        if let Some((key, _)) = unknown.get(UNKNOWN_KEYS_MAX) {
            let number = unknown.len() - UNKNOWN_KEYS_MAX;
            let message = format!("{number} more unknown keys{within}, from here on");
            faults.push(Fault::new(&key.place, message, "is this a file of the right kind?"));
        }
    }

    /// Where an unknown key belongs, or what it may have been meant as.
    fn help_with(&self, key: &str) -> String {
        let homes: Vec<String> = self
            .elsewhere
            .iter()
            .filter(|(name, _)| *name == key)
            .map(|(_, table)| match *table {
                "" => "at the top, before the first [table]".to_owned(),
                table => format!("in [{table}]"),
            })
            .collect();
        match homes.as_slice() {
            [] => did_you_mean(key, self.known.iter().copied()),
            homes => format!("it belongs {}", homes.join(" or ")),
        }
    }
}

fn join(path: &str, key: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    let key = if key.chars().all(plain) { key.to_owned() } else { quoted(key) };
    if path.is_empty() { key } else { format!("{path}.{key}") }
}

/// A value, not yet understood.
#[derive(Clone)]
pub struct Item<'a> {
    source: &'a Source,
    key: String,
    value: &'a Spanned<DeValue<'a>>,
}

impl<'a> Item<'a> {
    /// Where the value is written.
    #[must_use]
    pub fn place(&self) -> Place {
        self.source.place(&self.value.span())
    }

    /// Its key with all tables, such as `limits.memory`.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The text, if it is one.
    #[must_use]
    pub fn text(&self) -> Option<&'a str> {
        self.value.get_ref().as_str()
    }

    /// The truth value, if it is one.
    #[must_use]
    pub fn boolean(&self) -> Option<bool> {
        self.value.get_ref().as_bool()
    }

    /// The integer, if it is one that 64 bits hold.
    #[must_use]
    pub fn integer(&self) -> Option<i64> {
        let integer = self.value.get_ref().as_integer()?;
        i64::from_str_radix(integer.as_str(), integer.radix()).ok()
    }

    /// The number, if it is one, whole or not.
    #[must_use]
    pub fn number(&self) -> Option<f64> {
        match self.value.get_ref() {
            DeValue::Integer(_) => self.integer().map(|integer| integer as f64),
            DeValue::Float(float) => float.as_str().parse().ok(),
            _ => None,
        }
    }

    /// The elements, if it is an array.
    #[must_use]
    pub fn elements(&self) -> Option<Vec<Item<'a>>> {
        let element =
            |value: &'a Spanned<DeValue<'a>>| Item { value, key: self.key.clone(), ..*self };
        Some(self.value.get_ref().as_array()?.iter().map(element).collect())
    }

    /// Whether it is a table.
    #[must_use]
    pub fn is_table(&self) -> bool {
        self.value.get_ref().is_table()
    }

    /// Reads it as a table; anything else is a fault.
    pub fn table<T>(
        &self,
        faults: &mut Vec<Fault>,
        read: impl FnOnce(&mut Table<'_>, &mut Vec<Fault>) -> T,
    ) -> Option<T> {
        let Some(entries) = self.value.get_ref().as_table() else {
            faults.push(self.wrong("a table", &format!("write [{}] and its keys below", self.key)));
            return None;
        };
        let mut table = Table::new(self.source, self.key.clone(), entries);
        let value = read(&mut table, faults);
        table.finish(faults);
        Some(value)
    }

    /// "`key` is X, which is not WHAT; HELP".
    #[must_use]
    pub fn wrong(&self, what: &str, help: &str) -> Fault {
        self.fault(format!("is {}, which is not {what}", self.found()), help)
    }

    /// "`key` MESSAGE; HELP".
    #[must_use]
    pub fn fault(&self, message: impl AsRef<str>, help: impl Into<String>) -> Fault {
        Fault::new(&self.place(), format!("{} {}", self.key, message.as_ref()), help)
    }

    /// The value as it was written, for messages.
    fn found(&self) -> String {
        match self.value.get_ref() {
            DeValue::String(text) => quoted(text),
            DeValue::Integer(integer) => shortened(&integer.to_string()),
            DeValue::Float(float) => shortened(&float.to_string()),
            DeValue::Boolean(boolean) => boolean.to_string(),
            DeValue::Datetime(datetime) => datetime.to_string(),
            DeValue::Array(_) => "an array".to_owned(),
            DeValue::Table(_) => "a table".to_owned(),
        }
    }
}

fn shortened(number: &str) -> String {
    const DIGITS: usize = 40;
    if number.len() > DIGITS { format!("{}…", &number[..DIGITS]) } else { number.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults_of(text: &str) -> Vec<String> {
        let mut faults = Vec::new();
        Source::new(Path::new("f"), text.to_owned()).read(&mut faults, |table, faults| {
            table.keys_elsewhere([("pids", "limits")]);
            if let Some(item) = table.take("mode") {
                faults.extend(item.text().is_none().then(|| item.wrong("a word", "write one")));
            }
            table.section("limits", faults, |limits, _| drop(limits.take("pids")));
        });
        faults.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_unknown_key_and_wrong_type_is_told_with_its_place() {
        assert_eq!(
            faults_of("mode = 3\nmoed = 1\npids = 4\n[limits]\n\"pi ds\" = 1\n[limit]\n"),
            [
                "f:1:8: mode is 3, which is not a word; write one",
                "f:5:1: unknown key \"pi ds\" in [limits]; did you mean \"pids\"?",
                "f:2:1: unknown key \"moed\"; did you mean \"mode\"?",
                "f:3:1: unknown key \"pids\"; it belongs in [limits]",
                "f:6:2: unknown table \"limit\"; did you mean \"limits\"?",
            ]
        );
        assert_eq!(
            faults_of("limits = 5"),
            ["f:1:10: limits is 5, which is not a table; write [limits] and its keys below"]
        );
    }

    #[test]
    fn columns_count_characters_and_syntax_faults_have_places_too() {
        assert_eq!(
            faults_of("limits = { \"ä\" = 1, x = 2 }"),
            [
                "f:1:12: unknown key \"ä\" in [limits]; write one of \"pids\"",
                "f:1:21: unknown key \"x\" in [limits]; write one of \"pids\"",
            ]
        );
        for (text, place) in
            [("mode = \"x", "f:1:"), ("\nmode = ", "f:2:"), ("a = 1\na = 2\n", "f:2:1: ")]
        {
            let faults = faults_of(text);
            assert!(!faults.is_empty(), "{text:?}");
            assert!(faults.iter().all(|fault| fault.starts_with(place)), "{faults:?}");
            assert!(faults.iter().all(|fault| fault.contains("not valid TOML")), "{faults:?}");
        }
    }
}
