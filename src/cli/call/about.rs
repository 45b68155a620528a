//! What a call says besides what to run and how: headers for a service, and words
//! for the audit log.

use std::collections::BTreeSet;

use clap::Args;

use super::super::limits::parse_pair;
use crate::{protocol::grpc::metadata::PREFIX, wire::ServeRequest};

/// `--metadata`, `--request-id`, `--label`.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct AboutArgs {
    /// A header for a gRPC service; may be repeated, a value whose NAME ends with -bin is base64
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_pair)]
    metadata: Vec<(String, String)>,
    /// Your own name for this call, for the audit log
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    request_id: String,
    /// A label of this call, for the audit log; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    label: Vec<(String, String)>,
}

impl AboutArgs {
    /// Says it in a request.
    ///
    /// # Errors
    /// What was said twice: a request has one place for each.
    pub(super) fn add_to(&self, request: &mut ServeRequest) -> Result<(), String> {
        // Small and large letters make no other header, but another label.
        each_once("--metadata", self.metadata.iter().map(|(name, _)| name.to_ascii_lowercase()))?;
        each_once("--label", self.label.iter().map(|(key, _)| key.clone()))?;
        let headers = self.metadata.iter();
        let headers = headers.map(|(name, value)| (format!("{PREFIX}{name}"), value.clone()));
        request.execution_context.extend(headers);
        let options = request.options.get_or_insert_default();
        options.request_id.clone_from(&self.request_id);
        options.labels = self.label.iter().cloned().collect();
        Ok(())
    }
}

fn each_once(flag: &str, names: impl Iterator<Item = String>) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for name in names {
        if !seen.insert(name.clone()) {
            return Err(format!("{flag} {name} is given twice; give it once"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        about: AboutArgs,
    }

    fn request(words: &[&str]) -> Result<ServeRequest, String> {
        let mut request = ServeRequest::default();
        Cli::parse_from([&["call"], words].concat()).about.add_to(&mut request)?;
        Ok(request)
    }

    #[test]
    fn flags_become_context_and_options() {
        let words = ["--metadata", "x-user=Ada=1", "--metadata", "X-Key-bin=AA==", "--request-id"];
        let rest = ["r1", "--label", "team=a", "--label", "step="];
        let request = request(&[&words[..], &rest[..]].concat()).unwrap();
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let headers = [pair("metadata.x-user", "Ada=1"), pair("metadata.X-Key-bin", "AA==")].into();
        assert_eq!(request.execution_context, headers);
        let options = request.options.unwrap();
        assert_eq!(options.request_id, "r1");
        assert_eq!(options.labels, [pair("team", "a"), pair("step", "")].into());
    }

    #[test]
    fn nothing_said_is_nothing_sent() {
        let request = request(&[]).unwrap();
        assert!(request.execution_context.is_empty());
        assert_eq!(request.options, Some(crate::wire::ExecutionOptions::default()));
    }

    #[test]
    fn what_is_said_twice_or_has_no_name_is_wrong() {
        let told = request(&["--metadata", "a=1", "--metadata", "A=2"]).unwrap_err();
        assert!(told.starts_with("--metadata a is given twice"), "{told}");
        assert!(request(&["--label", "a=1", "--label", "a=1"]).is_err());
        assert!(request(&["--label", "a=1", "--label", "A=1"]).is_ok());
        for bad in [["call", "--metadata", "x"], ["call", "--label", "=x"]] {
            assert_eq!(Cli::try_parse_from(bad).unwrap_err().exit_code(), 2, "{bad:?}");
        }
    }
}
