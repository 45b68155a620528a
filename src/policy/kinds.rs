//! Kinds of values: how each is read, inherited, shown and described.
//!
//! A kind is a marker type; what it yields is its [`Kind::Value`]. The tables
//! of `written` say which key is of which kind, and all else follows.

use std::{fmt::Debug, marker::PhantomData};

use serde_json::{Value as Json, json};

use super::{
    fault::{At, Fault, did_you_mean, quoted},
    read::Item,
};

/// What an element `"..."` of a list stands for: the inherited list.
pub const INHERITED: &str = "...";

/// A kind of value.
pub trait Kind {
    /// What reading yields.
    type Value: Clone + Debug + PartialEq;

    /// Reads and checks one value; `None` when it is wrong, and `faults` say how.
    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<Self::Value>;

    /// Completes a given value by the one that it replaces; only lists with
    /// `"..."` and maps keep anything of it.
    fn inherit(given: &Self::Value, _inherited: &Self::Value) -> Self::Value {
        given.clone()
    }

    /// The value as one would write it.
    fn show(value: &Self::Value) -> Shown;

    /// Its JSON Schema.
    fn schema() -> Json;
}

/// A value as one would write it, with the places of its parts.
#[derive(Clone, Debug, PartialEq)]
pub enum Shown {
    /// A scalar.
    One(String),
    /// A list.
    List(Vec<At<String>>),
    /// A table whose keys are anything.
    Map(Vec<(String, At<String>)>),
}

impl Shown {
    /// On one line, without places.
    #[must_use]
    pub fn inline(&self) -> String {
        match self {
            Self::One(text) => text.clone(),
            Self::List(items) => {
                let items: Vec<&str> = items.iter().map(|item| item.value.as_str()).collect();
                format!("[{}]", items.join(", "))
            }
            Self::Map(entries) if entries.is_empty() => "{}".to_owned(),
            Self::Map(entries) => {
                let entries: Vec<String> =
                    entries.iter().map(|(key, item)| format!("{key} = {}", item.value)).collect();
                format!("{{ {} }}", entries.join(", "))
            }
        }
    }
}

/// A TOML string.
#[must_use]
pub fn toml_string(text: &str) -> String {
    // JSON's escapes are TOML's too, but JSON leaves DEL as it is.
    Json::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// Why a text was not accepted; `message` completes "KEY ...".
pub struct Wrong {
    /// Such as `is 1MiB, less than 4MiB`.
    pub message: String,
    /// What to write instead.
    pub help: String,
}

impl Wrong {
    /// Puts both together.
    pub fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: help.into() }
    }

    /// "is TEXT, which is not WHAT".
    #[must_use]
    pub fn is_not(text: &str, what: &str, help: impl Into<String>) -> Self {
        Self::new(format!("is {}, which is not {what}", quoted(text)), help)
    }
}

/// A kind that is written as a string.
pub trait Text {
    /// What reading yields.
    type Value: Clone + Debug + PartialEq;
    /// With an article, such as `a path`.
    const WHAT: &'static str;
    /// What to write, such as `write an absolute path`.
    const HELP: &'static str;

    /// Reads and checks it.
    ///
    /// # Errors
    /// What is wrong with it.
    fn parse(text: &str) -> Result<Self::Value, Wrong>;

    /// The value as text.
    fn show(value: &Self::Value) -> String;

    /// A regular expression for the schema, where one says it.
    fn pattern() -> Option<&'static str> {
        None
    }

    /// Its JSON Schema.
    fn text_schema() -> Json {
        match Self::pattern() {
            Some(pattern) => json!({ "type": "string", "pattern": pattern }),
            None => json!({ "type": "string" }),
        }
    }
}

impl<T: Text> Kind for T {
    type Value = T::Value;

    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<T::Value> {
        let Some(text) = item.text() else {
            faults.push(item.wrong(T::WHAT, T::HELP));
            return None;
        };
        if text.contains('\0') {
            faults.push(item.fault("contains a NUL character", "leave it out"));
            return None;
        }
        T::parse(text).map_err(|wrong| faults.push(item.fault(wrong.message, wrong.help))).ok()
    }

    fn show(value: &T::Value) -> Shown {
        Shown::One(toml_string(&<T as Text>::show(value)))
    }

    fn schema() -> Json {
        T::text_schema()
    }
}

/// One of a few words.
pub trait Words: Copy + Debug + PartialEq + 'static {
    /// Each word and what it means.
    const WORDS: &'static [(&'static str, Self)];
}

/// The kind of a [`Words`] type.
pub struct Word<W>(PhantomData<W>);

impl<W: Words> Kind for Word<W> {
    type Value = W;

    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<W> {
        let words = W::WORDS.iter().map(|(word, _)| *word);
        let given = item.text().unwrap_or_default();
        let found = W::WORDS.iter().find(|(word, _)| *word == given).map(|(_, value)| *value);
        if found.is_none() {
            let help = did_you_mean(given, words);
            faults.push(item.wrong("one of the words it can be", &help));
        }
        found
    }

    fn show(value: &W) -> Shown {
        let word = W::WORDS.iter().find(|(_, word)| word == value).map_or("", |(word, _)| word);
        Shown::One(toml_string(word))
    }

    fn schema() -> Json {
        json!({ "enum": W::WORDS.iter().map(|(word, _)| *word).collect::<Vec<_>>() })
    }
}

/// `true` or `false`.
pub struct Flag;

impl Kind for Flag {
    type Value = bool;

    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<bool> {
        let value = item.boolean();
        if value.is_none() {
            faults.push(item.wrong("true or false", "write true or false, without quotes"));
        }
        value
    }

    fn show(value: &bool) -> Shown {
        Shown::One(value.to_string())
    }

    fn schema() -> Json {
        json!({ "type": "boolean" })
    }
}

/// A list. With `INHERITS`, an element `"..."` stands for the inherited list.
pub struct List<K, const INHERITS: bool = true>(PhantomData<K>);

/// What a [`List`] yields.
#[derive(Clone, Debug, PartialEq)]
pub struct Items<T> {
    /// The elements, `"..."` left out.
    pub items: Vec<At<T>>,
    /// Before which element the inherited ones belong.
    pub inherited_at: Option<usize>,
}

impl<T: Clone> Items<T> {
    /// The bare values.
    #[must_use]
    pub fn values(&self) -> Vec<T> {
        self.items.iter().map(|item| item.value.clone()).collect()
    }
}

impl<K: Kind, const INHERITS: bool> Kind for List<K, INHERITS> {
    type Value = Items<K::Value>;

    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<Self::Value> {
        let Some(elements) = item.elements() else {
            faults.push(item.wrong("a list", "write it in brackets, such as [\"a\", \"b\"]"));
            return None;
        };
        let mut list = Items { items: Vec::new(), inherited_at: None };
        let mut whole = true;
        for element in elements {
            if INHERITS && element.text() == Some(INHERITED) {
                if list.inherited_at.replace(list.items.len()).is_some() {
                    faults.push(element.fault("has \"...\" twice", "leave one of them out"));
                    whole = false;
                }
            } else if let Some(value) = K::read(&element, faults) {
                list.items.push(At { value, place: element.place() });
            } else {
                whole = false;
            }
        }
        whole.then_some(list)
    }

    fn inherit(given: &Self::Value, inherited: &Self::Value) -> Self::Value {
        let mut items = given.items.clone();
        if let Some(at) = given.inherited_at {
            items.splice(at..at, inherited.items.iter().cloned());
        }
        Items { items, inherited_at: None }
    }

    fn show(value: &Self::Value) -> Shown {
        let show = |item: &At<K::Value>| At {
            value: K::show(&item.value).inline(),
            place: item.place.clone(),
        };
        Shown::List(value.items.iter().map(show).collect())
    }

    fn schema() -> Json {
        let items = K::schema();
        if !INHERITS {
            return json!({ "type": "array", "items": items });
        }
        json!({ "type": "array", "items": { "anyOf": [{ "const": INHERITED }, items] } })
    }
}

/// Shows where a text that names nothing stands in a list of names.
#[must_use]
pub fn unknown<'a>(text: &str, what: &str, known: impl IntoIterator<Item = &'a str>) -> Wrong {
    Wrong::new(format!("has {}, which is not {what}", quoted(text)), did_you_mean(text, known))
}
