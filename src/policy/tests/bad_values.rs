//! Wrong input for every key there is, with the exact place and message.

use std::collections::BTreeSet;

use super::faults_of;
use crate::policy::written::describe;

/// One wrong file.
struct Case {
    key: &'static str,
    file: String,
    begin: &'static str,
}

/// The cases of `testdata/bad_values.txt`; its first lines say how they are written.
fn cases() -> Vec<Case> {
    let text = include_str!("../testdata/bad_values.txt");
    let (_, cases) = text.split_once("\n= ").unwrap();
    let cases = cases.split("\n= ").map(|case| {
        let (key, rest) = case.split_once('\n').unwrap();
        let (file, begin) = rest.trim_end().rsplit_once("\n-> ").unwrap();
        Case { key, file: file.to_owned(), begin }
    });
    cases.collect()
}

#[test]
fn each_is_told_with_its_place_and_nothing_else_is() {
    let mut wrong = Vec::new();
    for Case { key, file, begin } in cases() {
        let faults = faults_of(&file);
        if faults.len() != 1 || !faults[0].starts_with(begin) {
            wrong.push(format!("{key}: {file:?}\n  expected {begin:?}\n  got      {faults:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_key_is_left_out() {
    let tried: BTreeSet<&str> = cases().iter().map(|case| case.key).collect();
    for key in describe() {
        let name = [key.table, key.key].join(".");
        let name = name.trim_start_matches('.');
        assert!(tried.contains(name), "no wrong value is tried for {name}");
    }
}

#[test]
fn every_fault_says_what_to_write_instead() {
    for case in cases() {
        for fault in faults_of(&case.file) {
            let (_, help) = fault.rsplit_once("; ").unwrap();
            assert!(help.len() > 4 && !help.ends_with('.'), "{fault}");
        }
    }
}

#[test]
fn all_faults_come_at_once() {
    let all: String = [
        "mode = \"jial\"\nmood = 1\n",
        "[limits]\nmemory = \"1\"\npids = \"x\"\n",
        "[seccomp]\nallow = [\"opneat\", \"nope\", \"read\"]\n",
        "[capabilities]\nkeep = [\"x\", \"y\"]\n",
        "[services]\nallow = [\"*\", \"a/b\"]\n",
    ]
    .concat();
    let faults = faults_of(&all);
    let places: Vec<&str> = faults.iter().map(|fault| fault.split_once(": ").unwrap().0).collect();
    let expected = ["1:8", "2:1", "4:10", "5:8", "7:10", "7:20", "9:9", "9:14", "11:10"];
    assert_eq!(places, expected, "{faults:#?}");
}
