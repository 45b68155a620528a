//! wordcount-rust: a service with two methods.
//!
//! - `count`: how many lines, words and bytes its input has.
//! - `top [N]`: the N most frequent words, 10 unless told otherwise.
//!
//! ```text
//! rustc --edition 2024 -O -C target-feature=+crt-static -o wordcount-rust main.rs
//! ```

use std::{
    collections::HashMap,
    env,
    io::{self, Read},
    process::ExitCode,
};

fn main() -> ExitCode {
    match answer() {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        // The report carries what stands on stderr; the exit status tells the two apart:
        // 2 for a call that makes no sense.
        Err(problem) => {
            eprintln!("wordcount-rust: {problem}");
            ExitCode::from(2)
        }
    }
}

fn answer() -> Result<String, String> {
    // "service", namespace, service, method, then the caller's own arguments.
    let arguments: Vec<String> = env::args().collect();
    let method = arguments.get(3).ok_or("started without a method")?;
    let mut input = Vec::new();
    io::stdin()
        .read_to_end(&mut input)
        .map_err(|error| format!("cannot read the input: {error}"))?;
    let text = String::from_utf8_lossy(&input);

    match method.as_str() {
        "count" => Ok(count(&text, input.len())),
        "top" => top(&text, arguments.get(4).map_or("10", String::as_str)),
        other => Err(format!("no method '{other}': there are 'count' and 'top'")),
    }
}

fn count(text: &str, bytes: usize) -> String {
    let (lines, words) = (text.lines().count(), text.split_whitespace().count());
    format!("{lines} lines, {words} words, {bytes} bytes\n")
}

fn top(text: &str, limit: &str) -> Result<String, String> {
    let limit: usize = limit.parse().map_err(|_| format!("'{limit}' is no number of words"))?;
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for word in text.split_whitespace() {
        *counts.entry(word).or_default() += 1;
    }
    let mut ranking: Vec<_> = counts.into_iter().collect();
    // The most frequent first; equals by the alphabet, so that the answer is always the same.
    ranking.sort_by(|(left, few), (right, many)| many.cmp(few).then(left.cmp(right)));
    let lines = ranking.iter().take(limit).map(|(word, count)| format!("{count} {word}\n"));
    Ok(lines.collect())
}
