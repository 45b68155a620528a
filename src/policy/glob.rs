//! `SERVICE/METHOD` globs: which calls a rule is about, and which of two rules
//! is the more specific.

use std::{
    cmp::{Ordering, Reverse},
    fmt,
};

use super::fault::quoted;
use crate::names::NAME_MAX;

/// A checked glob. `*` stands for any characters, `?` for one; neither for the
/// slash. `*` alone means `*/*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob {
    service: String,
    method: String,
}

impl Glob {
    /// What to write.
    pub const HELP: &'static str =
        "write SERVICE/METHOD, such as \"helloworld.Greeter/*\", or \"*\" alone for every call";

    /// Checks a glob.
    ///
    /// # Errors
    /// What is wrong with it, to complete the sentence "KEY ...".
    pub fn parse(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self { service: "*".to_owned(), method: "*".to_owned() });
        }
        let Some((service, method)) = text.split_once('/') else {
            return Err(format!("has {}, which names no method", quoted(text)));
        };
        for part in [service, method] {
            let fits = |c: char| c.is_ascii_alphanumeric() || "._-*?".contains(c);
            if part.is_empty() || part.len() > NAME_MAX || !part.chars().all(fits) {
                let text = quoted(text);
                return Err(format!("has {text}, which no service and method can match"));
            }
        }
        Ok(Self { service: service.to_owned(), method: method.to_owned() })
    }

    /// Whether it is about this method.
    #[must_use]
    pub fn matches(&self, service: &str, method: &str) -> bool {
        part_matches(&self.service, service) && part_matches(&self.method, method)
    }

    /// Whether it is about every call.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        [&self.service, &self.method].into_iter().all(|part| part.bytes().all(|byte| byte == b'*'))
    }

    /// `Greater` where this one is the more specific: the service counts first,
    /// a name before a pattern, a pattern with more letters before one with fewer.
    #[must_use]
    pub fn compare_specificity(&self, other: &Self) -> Ordering {
        let rank = |part: &str| {
            let stars = part.bytes().filter(|byte| *byte == b'*').count();
            let marks = part.bytes().filter(|byte| *byte == b'?').count();
            (stars + marks == 0, part.len() - stars - marks, Reverse(stars))
        };
        let key = |glob: &Self| (rank(&glob.service), rank(&glob.method));
        key(self).cmp(&key(other))
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.service == "*" && self.method == "*" {
            return f.write_str("*");
        }
        write!(f, "{}/{}", self.service, self.method)
    }
}

/// Matches in linear space and at most `pattern × text` steps: on a mismatch
/// only the latest `*` takes one character more.
fn part_matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut at, mut seen) = (0, 0);
    let mut latest_star: Option<(usize, usize)> = None;
    while seen < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                latest_star = Some((at, seen));
                at += 1;
            }
            Some(&byte) if byte == b'?' || byte == text[seen] => {
                at += 1;
                seen += 1;
            }
            _ => {
                let Some((star, taken)) = latest_star else { return false };
                latest_star = Some((star, taken + 1));
                at = star + 1;
                seen = taken + 1;
            }
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn stars_and_question_marks_stay_within_their_part() {
        let matches = |glob: &str, service: &str, method: &str| {
            Glob::parse(glob).unwrap().matches(service, method)
        };
        assert!(matches("*", "greeter", "SayHello"));
        assert!(matches("greeter/SayHello", "greeter", "SayHello"));
        assert!(!matches("greeter/SayHello", "greeter", "SayHell"));
        assert!(matches("hello*.Gr??ter/Say*o", "helloworld.Greeter", "SayHello"));
        assert!(!matches("*/Say", "greeter", "SayHello"));
        assert!(!matches("a*b*c/x", "aXbX", "x"));
        assert!(matches("a*b*c/x", "abbcXbc", "x"));
        assert!(!matches("?/x", "", "x"));
    }

    #[test]
    fn what_no_call_can_match_is_refused() {
        for bad in ["", "greeter", "hello*", "/", "a/", "/b", "a/b/c", "a b/c", "[ab]/c", "ä/c"] {
            assert!(Glob::parse(bad).is_err(), "{bad:?}");
        }
        assert!(Glob::parse(&format!("{}/x", "a".repeat(129))).is_err());
    }

    #[test]
    fn the_more_specific_is_the_one_that_says_more() {
        let order = ["a.b/c", "a.b/c*", "a.b/?", "a.b/*", "a.*/c", "a*/*", "?/c", "*/c", "*"];
        for (index, more) in order.iter().enumerate() {
            for less in &order[index + 1..] {
                let (more, less) = (Glob::parse(more).unwrap(), Glob::parse(less).unwrap());
                assert_eq!(more.compare_specificity(&less), Ordering::Greater, "{more} {less}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused_and_read_back_the_same(text in "[a-c*?/._]{0,12}|\\PC{0,20}") {
            if let Ok(glob) = Glob::parse(&text) {
                prop_assert_eq!(Glob::parse(&glob.to_string()), Ok(glob));
            }
        }

        #[test]
        fn a_match_agrees_with_trying_every_split(pattern in "[ab*?]{0,8}", text in "[ab]{0,8}") {
            fn slow(pattern: &[u8], text: &[u8]) -> bool {
                match pattern.split_first() {
                    None => text.is_empty(),
                    Some((b'*', rest)) => (0..=text.len()).any(|n| slow(rest, &text[n..])),
                    Some((b'?', rest)) => !text.is_empty() && slow(rest, &text[1..]),
                    Some((byte, rest)) => text.first() == Some(byte) && slow(rest, &text[1..]),
                }
            }
            prop_assert_eq!(
                part_matches(&pattern, &text),
                slow(pattern.as_bytes(), text.as_bytes())
            );
        }
    }
}
