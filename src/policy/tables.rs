//! From one declaration of tables and keys: a struct of what a file says, a
//! struct of what holds, and the steps between them.

use serde_json::Value as Json;

use super::{fault::Place, kinds::Shown};

/// A key that holds a value, for `explain`.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    /// The table, such as `limits`; empty for the outermost one.
    pub table: &'static str,
    /// The key within it.
    pub key: &'static str,
    /// The value.
    pub shown: Shown,
    /// Where it was written.
    pub place: &'a Place,
}

/// A key, for the schema and for help.
#[derive(Clone, Debug)]
pub struct Description {
    /// The table; empty for the outermost one.
    pub table: &'static str,
    /// The key within it.
    pub key: &'static str,
    /// What it is for.
    pub text: String,
    /// Its JSON Schema.
    pub schema: Json,
}

/// Declares the tables of a file.
///
/// Each table becomes a module with `Written` (what a file says: every key
/// optional) and `Resolved` (what holds: every key present), and the two of
/// all tables together stand beside the modules.
macro_rules! tables {
    ($(
        $(#[doc = $about:literal])+
        $table:ident [$path:literal] {
            $( $(#[doc = $doc:literal])+ $key:ident: $kind:ty, )+
        }
    )+) => {
        $(
            $(#[doc = $about])+
            pub mod $table {
                #[allow(unused_imports)]
                use super::*;
                use $crate::policy::{
                    fault::{At, Fault},
                    kinds::Kind,
                    read::Table,
                    tables::{Description, Entry},
                };

                /// What a file says; `None` where it says nothing.
                #[derive(Clone, Debug, Default)]
                pub struct Written {
                    $( $(#[doc = $doc])+ pub $key: Option<At<<$kind as Kind>::Value>>, )+
                    /// Keys that are given, but wrong.
                    pub faulty: Vec<&'static str>,
                }

                /// What holds, and where each value comes from.
                #[derive(Clone, Debug, PartialEq)]
                pub struct Resolved {
                    $( $(#[doc = $doc])+ pub $key: At<<$kind as Kind>::Value>, )+
                    /// Keys whose value isn't known, because what was given is wrong.
                    pub faulty: Vec<&'static str>,
                }

                impl Written {
                    /// Takes this table's keys from `table`.
                    pub fn read(table: &mut Table<'_>, faults: &mut Vec<Fault>) -> Self {
                        let mut written = Self::default();
                        $( if let Some(item) = table.take(stringify!($key)) {
                            match <$kind as Kind>::read(&item, faults) {
                                Some(value) => {
                                    written.$key = Some(At { value, place: item.place() });
                                }
                                None => written.faulty.push(stringify!($key)),
                            }
                        } )+
                        written
                    }

                    /// As what holds, if every key is given.
                    #[must_use]
                    pub fn complete(self) -> Option<Resolved> {
                        Some(Resolved { $( $key: self.$key?, )+ faulty: self.faulty })
                    }
                }

                impl Resolved {
                    /// Lays what a file says over what held so far.
                    pub fn overlay(&mut self, written: &Written) {
                        $( if let Some(given) = &written.$key {
                            let value = <$kind as Kind>::inherit(&given.value, &self.$key.value);
                            self.$key = At { value, place: given.place.clone() };
                            self.faulty.retain(|key| *key != stringify!($key));
                        } )+
                        self.faulty.extend(&written.faulty);
                    }

                    /// Every key with its value.
                    #[must_use]
                    pub fn entries(&self) -> Vec<Entry<'_>> {
                        vec![ $( Entry {
                            table: $path,
                            key: stringify!($key),
                            shown: <$kind as Kind>::show(&self.$key.value),
                            place: &self.$key.place,
                        }, )+ ]
                    }
                }

                /// Every key with its meaning.
                #[must_use]
                pub fn describe() -> Vec<Description> {
                    vec![ $( Description {
                        table: $path,
                        key: stringify!($key),
                        text: [$($doc),+].map(str::trim).join(" "),
                        schema: <$kind as Kind>::schema(),
                    }, )+ ]
                }
            }
        )+

        /// What the tables of a file say.
        #[derive(Clone, Debug, Default)]
        pub struct Tables {
            $( $(#[doc = $about])+ pub $table: $table::Written, )+
        }

        impl Tables {
            /// Takes every table from the outermost one.
            pub fn read(
                table: &mut $crate::policy::read::Table<'_>,
                faults: &mut Vec<$crate::policy::fault::Fault>,
            ) -> Self {
                Self { $(
                    $table: table
                        .section($path, faults, $table::Written::read)
                        .unwrap_or_default(),
                )+ }
            }

            /// As what holds, if every key is given.
            #[must_use]
            pub fn complete(self) -> Option<Resolved> {
                Some(Resolved { $( $table: self.$table.complete()?, )+ })
            }
        }

        /// What holds in all tables, and where each value comes from.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Resolved {
            $( $(#[doc = $about])+ pub $table: $table::Resolved, )+
        }

        impl Resolved {
            /// Lays what a file says over what held so far.
            pub fn overlay(&mut self, written: &Tables) {
                $( self.$table.overlay(&written.$table); )+
            }

            /// Every key of every table.
            #[must_use]
            pub fn entries(&self) -> Vec<$crate::policy::tables::Entry<'_>> {
                [$( self.$table.entries(), )+].concat()
            }
        }

        /// Every key of every table, with its meaning.
        #[must_use]
        pub fn describe() -> Vec<$crate::policy::tables::Description> {
            [$( $table::describe(), )+].concat()
        }

        /// What each table is for.
        pub const TABLES: &[(&str, &str)] = &[$( ($path, concat!($($about),+)), )+];
    };
}

pub(crate) use tables;
