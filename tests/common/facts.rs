//! The `key=value` lines that test programs print.

use std::collections::BTreeSet;

/// What a program said, in its order; a key may come more than once.
#[derive(Clone, Debug, Default)]
pub struct Facts(Vec<(String, String)>);

impl Facts {
    /// Splits lines at their first `=`; lines without one are ignored.
    pub fn parse(text: &str) -> Self {
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        Self(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    /// The value of a key that came exactly once.
    #[track_caller]
    pub fn one(&self, key: &str) -> &str {
        let values = self.all(key);
        assert_eq!(values.len(), 1, "{key} once, in {self:#?}");
        values[0]
    }

    /// The value of a key that came once or not at all.
    #[track_caller]
    pub fn maybe(&self, key: &str) -> Option<&str> {
        let values = self.all(key);
        assert!(values.len() <= 1, "{key} at most once, in {self:#?}");
        values.first().copied()
    }

    /// Every value of a key.
    pub fn all(&self, key: &str) -> Vec<&str> {
        self.0.iter().filter(|(k, _)| k == key).map(|(_, value)| value.as_str()).collect()
    }

    /// Every value of a key, as a set.
    pub fn set(&self, key: &str) -> BTreeSet<&str> {
        self.all(key).into_iter().collect()
    }

    /// All pairs whose key starts so, without that prefix.
    pub fn under<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0.iter().filter_map(move |(key, value)| Some((key.strip_prefix(prefix)?, &**value)))
    }

    /// The first word of the value of a key that came once, as a number.
    #[track_caller]
    pub fn number(&self, key: &str) -> u64 {
        let text = self.one(key);
        text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or_else(|| {
            panic!("{key}={text} begins with a number");
        })
    }
}
