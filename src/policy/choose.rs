//! Which policy a call goes by.

use super::{Policy, PolicyFamily, PolicySet, glob::Glob};
use crate::names::Namespace;

/// The policy of all namespaces that have none of their own.
pub const DEFAULT: &str = "default";

impl PolicySet {
    /// The policy for a call: the namespace's own, else `default`, and of it the
    /// most specific `[service."…"]` override that matches (of two equally
    /// specific ones the first). `None` where the namespace has no policy.
    ///
    /// Whether it allows the call is another question: see [`Policy::serves`].
    #[must_use]
    pub fn choose(&self, namespace: &Namespace, service: &str, method: &str) -> Option<&Policy> {
        let family = self.family(namespace)?;
        let overrides = family.overrides.iter().map(|(glob, policy)| (glob.as_str(), policy));
        Some(most_specific(overrides, service, method).unwrap_or(&family.base))
    }

    /// Every policy that [`Self::choose`] may choose for some call of the namespace.
    pub fn all_of(&self, namespace: &Namespace) -> impl Iterator<Item = &Policy> {
        self.family(namespace).into_iter().flat_map(|family| {
            let overrides = family.overrides.iter().map(|(_, policy)| policy);
            std::iter::once(&family.base).chain(overrides)
        })
    }

    fn family(&self, namespace: &Namespace) -> Option<&PolicyFamily> {
        self.policies.get(namespace.as_str()).or_else(|| self.policies.get(DEFAULT))
    }
}

impl Policy {
    /// Whether `[services] allow` has a glob for this method.
    #[must_use]
    pub fn serves(&self, service: &str, method: &str) -> bool {
        self.services
            .iter()
            .any(|glob| Glob::parse(glob).is_ok_and(|glob| glob.matches(service, method)))
    }
}

/// Of the rules that match, the most specific; of equals, the first.
pub fn most_specific<'a, T>(
    rules: impl IntoIterator<Item = (&'a str, T)>,
    service: &str,
    method: &str,
) -> Option<T> {
    let mut best: Option<(Glob, T)> = None;
    for (text, rule) in rules {
        let Ok(glob) = Glob::parse(text) else { continue };
        let better = |(known, _): &(Glob, T)| glob.compare_specificity(known).is_gt();
        if glob.matches(service, method) && best.as_ref().is_none_or(better) {
            best = Some((glob, rule));
        }
    }
    best.map(|(_, rule)| rule)
}
