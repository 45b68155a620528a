//! `dispatcher doctor`: what this host can and can't enforce, and how to mend it.

mod trial;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;
use serde_json::{Value, json};

use super::exit;
use crate::{
    config::{self, ConfigOverrides, LoadedConfig, Surroundings},
    host::{Demand, Finding, Host, Settings, Shortfall, Subject},
    jail::plan::{Mode, TemplateId},
    policy::{
        Policy, PolicySet,
        compile::{self, Loaded, host_user, load},
        fault::Fault,
    },
};
use trial::Subject as Tried;

/// Arguments of `dispatcher doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The directory of policies [default: the one that `serve` would read]
    #[arg(long, value_name = "DIR")]
    policies: Option<PathBuf>,
    /// The server's own file [default: $DISPATCHER_CONFIG, else the one that `serve` would read]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
#[must_use]
pub fn run(args: &DoctorArgs) -> ExitCode {
    let overrides = ConfigOverrides {
        policies: args.policies.clone(),
        // Where it listens is of no concern here.
        insecure: Some(true),
        ..ConfigOverrides::default()
    };
    let loaded = match config::load(args.config.as_deref(), &overrides, &Surroundings::current()) {
        Ok(loaded) => loaded,
        Err(faults) => return bad_configuration(&faults),
    };
    let config = &loaded.config;
    let settings =
        Settings { cgroup_parent: config.cgroup_parent.clone(), uid_range: config.uid_range };
    let host = match Host::examine(&settings) {
        Ok(host) => host,
        Err(error) => {
            return exit::fail(exit::FAILURE, format_args!("this host can't be examined: {error}"));
        }
    };
    // A directory that nobody named may be missing: that is no illness of the host's.
    let named = args.policies.is_some();
    let mut diagnosis = Diagnosis {
        as_root: host.is_root(),
        findings: host.findings().to_vec(),
        policies: Policies::examine(&host, &config.policies, named),
    };
    let closed = host.close();
    let tried = diagnosis.policies.try_out(&loaded);
    let mut stdout = io::stdout().lock();
    let told = match args.json {
        true => writeln!(stdout, "{:#}", diagnosis.json()),
        false => diagnosis.print(&mut stdout),
    };
    let told = told.and_then(|()| stdout.flush());
    if let Err(error) = closed {
        return exit::fail(exit::FAILURE, error);
    }
    if let Err(error) = tried {
        return exit::fail(exit::FAILURE, format_args!("no jail could be tried: {error}"));
    }
    match (told, diagnosis.policies.all_well()) {
        (Ok(()), true) => ExitCode::SUCCESS,
        _ => ExitCode::from(exit::FAILURE),
    }
}

fn bad_configuration(faults: &[Fault]) -> ExitCode {
    for fault in faults {
        eprintln!("{fault}");
    }
    ExitCode::from(exit::BAD_CONFIGURATION)
}

/// All that there is to tell.
struct Diagnosis {
    as_root: bool,
    findings: Vec<Finding>,
    policies: Policies,
}

/// The policies of a directory, each with what it lacks here.
struct Policies {
    directory: PathBuf,
    /// Why they can't be read.
    faults: Vec<Fault>,
    /// Whether there is no such directory, and nobody asked for it: then the
    /// built-in policy is looked at.
    absent: bool,
    /// What they say, if it can be read.
    loaded: Option<Loaded>,
    verdicts: Vec<Verdict>,
}

/// One policy (or an override of it) in one of its modes.
struct Verdict {
    policy: String,
    /// The override's glob.
    rule: Option<String>,
    template: TemplateId,
    mode: Mode,
    shortfalls: Vec<Shortfall>,
    /// A program was run under it, and what went wrong.
    tried: Option<Result<(), String>>,
}

impl Verdict {
    fn is_well(&self) -> bool {
        self.shortfalls.is_empty() && !matches!(self.tried, Some(Err(_)))
    }
}

impl Policies {
    fn examine(host: &Host, directory: &Path, named: bool) -> Self {
        let mut policies = Self {
            directory: directory.to_owned(),
            faults: Vec::new(),
            absent: !named && !directory.exists(),
            loaded: None,
            verdicts: Vec::new(),
        };
        let loaded = match policies.absent {
            true => compile::built_in(&host_user),
            false => load(directory, &host_user),
        };
        match loaded {
            Ok(loaded) => {
                policies.verdicts = verdicts(host, &loaded.set);
                policies.loaded = Some(loaded);
            }
            Err(faults) => policies.faults = faults,
        }
        policies
    }

    /// Makes a jail by each policy that lacks nothing, and runs a program in it.
    fn try_out(&mut self, settings: &LoadedConfig) -> Result<(), String> {
        let Some(loaded) = &self.loaded else { return Ok(()) };
        let mut hopeful: Vec<_> =
            self.verdicts.iter_mut().filter(|one| one.shortfalls.is_empty()).collect();
        let subjects: Vec<Tried> =
            hopeful.iter().map(|one| (one.template.clone(), one.mode)).collect();
        let results = trial::run(settings, loaded, &subjects)?;
        for (verdict, result) in hopeful.iter_mut().zip(results) {
            verdict.tried = Some(result);
        }
        Ok(())
    }

    fn all_well(&self) -> bool {
        self.faults.is_empty() && self.verdicts.iter().all(Verdict::is_well)
    }
}

fn verdicts(host: &Host, set: &PolicySet) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for (name, family) in &set.policies {
        let mut examine = |rule: Option<&String>, policy: &Policy| {
            verdicts.extend(Demand::of(policy).map(|demand| Verdict {
                policy: name.clone(),
                rule: rule.cloned(),
                template: policy.id.clone(),
                mode: demand.mode,
                shortfalls: host.shortfalls(&demand),
                tried: None,
            }));
        };
        examine(None, &family.base);
        for (rule, policy) in &family.overrides {
            examine(Some(rule), policy);
        }
    }
    verdicts
}

impl Diagnosis {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let kernel = rustix::system::uname();
        let user = if self.as_root { "root" } else { "an ordinary user" };
        let (release, machine) = (kernel.release().to_string_lossy(), kernel.machine());
        writeln!(out, "Linux {release} on {}, as {user}\n", machine.to_string_lossy())?;
        for finding in &self.findings {
            let subject = finding.subject.to_string();
            match (finding.ok, finding.why.as_str()) {
                (true, "") => writeln!(out, "  ok       {subject}")?,
                (true, how) => writeln!(out, "  ok       {subject:<16} {how}")?,
                (false, why) => {
                    writeln!(out, "  LACKING  {subject:<16} {why}")?;
                    mend(out, &finding.mend)?;
                }
            }
        }
        self.policies.print(&self.findings, out)
    }

    fn json(&self) -> Value {
        let kernel = rustix::system::uname();
        let findings: Vec<_> = self.findings.iter().map(finding_json).collect();
        json!({
            "kernel": kernel.release().to_string_lossy(),
            "machine": kernel.machine().to_string_lossy(),
            "root": self.as_root,
            "findings": findings,
            "policies": self.policies.json(),
            "ok": self.policies.all_well(),
        })
    }
}

impl Policies {
    fn print(&self, told: &[Finding], out: &mut dyn Write) -> io::Result<()> {
        let directory = self.directory.display();
        match self.absent {
            true => writeln!(out, "\n{directory} is not there; the built-in policy:")?,
            false => writeln!(out, "\nPolicies in {directory}:")?,
        }
        for fault in &self.faults {
            writeln!(out, "  WRONG    {fault}")?;
        }
        for verdict in &self.verdicts {
            let rule = verdict.rule.as_ref().map_or(String::new(), |rule| format!(" [{rule}]"));
            let name = format!("{}{rule}, mode {}", verdict.policy, verdict.mode);
            if verdict.shortfalls.is_empty() {
                match &verdict.tried {
                    Some(Ok(())) => writeln!(out, "  ok       {name}: a program ran under it")?,
                    Some(Err(why)) => writeln!(out, "  FAILS    {name}: {why}")?,
                    None => writeln!(out, "  untried  {name}")?,
                }
                continue;
            }
            writeln!(out, "  REFUSED  {name}: calls are refused as control_unavailable")?;
            // What was told above need not be told again for each policy.
            let (above, own): (Vec<_>, Vec<_>) = verdict
                .shortfalls
                .iter()
                .partition(|one| told.iter().any(|finding| finding.why == one.why));
            if !above.is_empty() {
                let names: Vec<_> = above.iter().map(|one| one.subject.to_string()).collect();
                writeln!(out, "           lacking, see above: {}", names.join(", "))?;
            }
            for shortfall in own {
                writeln!(out, "           {}: {}", shortfall.subject, shortfall.why)?;
                mend(out, &shortfall.mend)?;
            }
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let faults: Vec<_> = self.faults.iter().map(ToString::to_string).collect();
        let verdicts: Vec<_> = self.verdicts.iter().map(verdict_json).collect();
        json!({ "directory": self.directory, "faults": faults, "policies": verdicts })
    }
}

fn mend(out: &mut dyn Write, mend: &str) -> io::Result<()> {
    if mend.is_empty() { Ok(()) } else { writeln!(out, "           mend: {mend}") }
}

fn finding_json(finding: &Finding) -> Value {
    let kind = match finding.subject {
        Subject::Control(_) => "control",
        Subject::Feature(_) => "feature",
    };
    json!({
        kind: finding.subject.to_string(),
        "ok": finding.ok,
        "why": finding.why,
        "mend": finding.mend,
    })
}

fn verdict_json(verdict: &Verdict) -> Value {
    let lacks: Vec<_> = verdict
        .shortfalls
        .iter()
        .map(|one| json!({ "control": one.subject.to_string(), "why": one.why, "mend": one.mend }))
        .collect();
    json!({
        "policy": verdict.policy,
        "service": verdict.rule,
        "mode": verdict.mode.to_string(),
        "ok": verdict.is_well(),
        "tried": verdict.tried.is_some(),
        "why": verdict.tried.as_ref().and_then(|tried| tried.as_ref().err()),
        "lacks": lacks,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::plan::Control;

    fn diagnosis() -> Diagnosis {
        let finding = |control, ok: bool, why: &str, mend: &str| Finding {
            subject: Subject::Control(control),
            ok,
            why: why.to_owned(),
            mend: mend.to_owned(),
        };
        let shortfall = |control, why: &str| Shortfall {
            subject: Subject::Control(control),
            why: why.to_owned(),
            mend: "do this".to_owned(),
        };
        let verdict = |policy: &str, shortfalls, tried| Verdict {
            policy: policy.to_owned(),
            rule: None,
            template: TemplateId { policy: policy.to_owned(), variant: 0 },
            mode: Mode::Jail,
            shortfalls,
            tried,
        };
        Diagnosis {
            as_root: false,
            findings: vec![
                finding(Control::NsUser, true, "", ""),
                finding(Control::CgroupCpu, false, "it isn't delegated", "delegate it"),
            ],
            policies: Policies {
                directory: PathBuf::from("/policies"),
                faults: Vec::new(),
                absent: false,
                loaded: None,
                verdicts: vec![
                    verdict("good", Vec::new(), Some(Ok(()))),
                    verdict(
                        "bad",
                        vec![
                            shortfall(Control::CgroupCpu, "it isn't delegated"),
                            shortfall(Control::Rlimits, "too many"),
                        ],
                        None,
                    ),
                    verdict("odd", Vec::new(), Some(Err("it did not".to_owned()))),
                ],
            },
        }
    }

    #[test]
    fn each_lack_is_told_once_with_what_mends_it() {
        let mut text = Vec::new();
        diagnosis().print(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let (_, text) = text.split_once("\n\n").unwrap();
        assert_eq!(
            text,
            "  ok       ns.user
  LACKING  cgroup.cpu       it isn't delegated
           mend: delegate it

Policies in /policies:
  ok       good, mode jail: a program ran under it
  REFUSED  bad, mode jail: calls are refused as control_unavailable
           lacking, see above: cgroup.cpu
           rlimits: too many
           mend: do this
  FAILS    odd, mode jail: it did not
"
        );
    }

    #[test]
    fn json_tells_the_same() {
        let diagnosis = diagnosis();
        let json = diagnosis.json();
        assert_eq!(json["ok"], false);
        assert_eq!(
            json["findings"][0],
            json!({"control": "ns.user", "ok": true, "why": "", "mend": ""})
        );
        let policies = &json["policies"]["policies"];
        assert_eq!(policies[0]["ok"], true);
        assert_eq!(policies[1]["lacks"][1]["control"], "rlimits");
        assert_eq!((&policies[0]["tried"], &policies[1]["tried"]), (&json!(true), &json!(false)));
        assert_eq!(
            (&policies[2]["ok"], &policies[2]["why"]),
            (&json!(false), &json!("it did not"))
        );
        assert!(!diagnosis.policies.all_well());
    }
}
