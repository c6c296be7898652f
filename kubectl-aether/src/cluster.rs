//! The cluster that is talked to, and errors that name the object and the way out.

use std::fmt::Debug;

use aether_api::AetherSession;
use anyhow::{Context as _, Result, anyhow, bail};
use k8s_openapi::NamespaceResourceScope;
use kube::api::{Api, ListParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, Resource, ResourceExt};
use serde::de::DeserializeOwned;

use crate::cli::Connection;

/// A connected cluster and the namespace that commands mean.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) client: Client,
    pub(crate) namespace: String,
    pub(crate) quiet: bool,
}

impl Cluster {
    /// Reads the kubeconfig as kubectl does. Nothing is sent yet.
    pub(crate) async fn connect(options: &Connection) -> Result<Self> {
        let choice = KubeConfigOptions {
            context: options.context.clone(),
            cluster: options.cluster.clone(),
            user: options.user.clone(),
        };
        let chosen = choice.context.is_some() || choice.cluster.is_some() || choice.user.is_some();
        let mut config = match &options.kubeconfig {
            Some(path) => {
                let file = Kubeconfig::read_from(path)
                    .with_context(|| format!("cannot read kubeconfig {}", path.display()))?;
                Config::from_custom_kubeconfig(file, &choice)
                    .await
                    .with_context(|| format!("kubeconfig {}", path.display()))?
            }
            None if chosen => Config::from_kubeconfig(&choice).await.context("cannot use the kubeconfig")?,
            // Inside a pod there is no kubeconfig but a service account.
            None => Config::infer().await.context("no cluster to talk to: set KUBECONFIG or say --kubeconfig")?,
        };
        if let Some(user) = &options.impersonate {
            config.auth_info.impersonate = Some(user.clone());
            config.auth_info.impersonate_groups =
                (!options.impersonate_groups.is_empty()).then(|| options.impersonate_groups.clone());
        }
        let namespace = options.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).context("cannot set up the connection that the kubeconfig describes")?;
        Ok(Self { client, namespace, quiet: options.quiet })
    }

    /// Objects of one kind, of the namespace.
    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The object of this name; the error lists what there is instead.
    pub(crate) async fn find<K>(&self, name: &str) -> Result<K>
    where
        K: Resource<Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
        K::DynamicType: Default,
    {
        let found = self
            .api::<K>()
            .get_opt(name)
            .await
            .map_err(|error| explain(error, &format!("read {}", noun::<K>(name))))?;
        match found {
            Some(object) => Ok(object),
            None => bail!("{}", self.not_found::<K>(name).await),
        }
    }

    /// Says that there is no such object, what is named alike, and in which other namespaces the name exists.
    pub(crate) async fn not_found<K>(&self, name: &str) -> String
    where
        K: Resource<Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
        K::DynamicType: Default,
    {
        let mut text = format!("{} does not exist in namespace {}", noun::<K>(name), self.namespace);
        let Ok(here) = self.api::<K>().list_metadata(&ListParams::default()).await else { return text };
        let names: Vec<String> = here.items.iter().map(ResourceExt::name_any).collect();
        let similar = similar(name, &names);
        if !similar.is_empty() {
            text += &format!("; did you mean {}?", similar.join(", "));
            return text;
        }
        // Not everybody may look into other namespaces; then there is nothing to add.
        let everywhere: Api<K> = Api::all(self.client.clone());
        if let Ok(list) =
            everywhere.list_metadata(&ListParams::default().fields(&format!("metadata.name={name}"))).await
        {
            let namespaces: Vec<String> = list.items.iter().filter_map(ResourceExt::namespace).collect();
            if !namespaces.is_empty() {
                text += &format!("; there is one in namespace {}: use -n", namespaces.join(", "));
                return text;
            }
        }
        match names.len() {
            0 => text += ", which has none",
            count @ 1..=8 => text += &format!("; there {} {}", if count == 1 { "is" } else { "are" }, names.join(", ")),
            count => {
                text += &format!(
                    ", which has {count} others: see `kubectl get {} -n {}`",
                    K::plural(&Default::default()),
                    self.namespace
                )
            }
        }
        text
    }

    /// A session that is there and is not on its way out.
    pub(crate) async fn session(&self, name: &str) -> Result<AetherSession> {
        let session: AetherSession = self.find(name).await?;
        if session.metadata.deletion_timestamp.is_some() {
            bail!("session {name} of namespace {} is being deleted", self.namespace);
        }
        Ok(session)
    }
}

/// `session a`, `checkpoint b`, …
pub(crate) fn noun<K: Resource>(name: &str) -> String
where
    K::DynamicType: Default,
{
    format!("{} {name}", kind_word::<K>())
}

/// The kind in a person's words.
pub(crate) fn kind_word<K: Resource>() -> String
where
    K::DynamicType: Default,
{
    let kind = K::kind(&Default::default()).to_lowercase();
    kind.strip_prefix("aether").map(ToOwned::to_owned).unwrap_or(kind)
}

/// Turns an error of the API into one that says what was tried and what can be done.
pub(crate) fn explain(error: kube::Error, action: &str) -> anyhow::Error {
    match error {
        kube::Error::Api(status)
            if status.code == 404 && status.details.as_ref().is_none_or(|details| details.name.is_empty()) =>
        {
            anyhow!(
                "cannot {action}: this cluster does not know group {}: Aether is not installed in it, or its custom resources are missing",
                aether_api::names::GROUP
            )
        }
        kube::Error::Api(status) if status.code == 401 => {
            anyhow!(
                "cannot {action}: the cluster does not accept your login ({}): log in again, or say another --context",
                status.message
            )
        }
        kube::Error::Api(status) if status.code == 403 => anyhow!(
            "cannot {action}: {}. Ask who runs the cluster for a role that allows it",
            status.message.trim_end_matches('.')
        ),
        kube::Error::Api(status) => anyhow!("cannot {action}: {}", status.message),
        kube::Error::Service(error) => {
            anyhow!("cannot {action}: the API server does not answer: {}", innermost(error.as_ref()))
        }
        kube::Error::HyperError(error) => {
            anyhow!("cannot {action}: the API server does not answer: {}", innermost(&error))
        }
        other => anyhow!(other).context(format!("cannot {action}")),
    }
}

/// The last word of a chain of errors, which is the one that says something.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Names that may have been meant, the likeliest first, at most three.
fn similar<'a>(name: &str, names: &'a [String]) -> Vec<&'a str> {
    let mut scored: Vec<(usize, &str)> = names
        .iter()
        .map(|other| {
            let distance = distance(name, other);
            // What was typed as the beginning or end of a name is as good as one typing error.
            let part = name.len() >= 3 && (other.starts_with(name) || other.ends_with(name));
            (if part { distance.min(1) } else { distance }, other.as_str())
        })
        .filter(|(distance, _)| *distance <= 1 + name.len() / 5)
        .collect();
    scored.sort_unstable();
    scored.into_iter().take(3).map(|(_, name)| name).collect()
}

/// Levenshtein's distance: insertions, deletions and replacements from one to the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    #[test]
    fn similar_names_are_found() {
        let names: Vec<String> = ["fix-login", "fix-logout", "docs", "attempt-1"].map(String::from).into();
        assert_eq!(similar("fix-logn", &names), ["fix-login"]);
        assert_eq!(similar("fix", &names), ["fix-login", "fix-logout"]);
        assert!(similar("something-else", &names).is_empty());
        assert_eq!(distance("kitten", "sitting"), 3);
    }

    #[test]
    fn errors_say_the_way_out() {
        let status = |code, message: &str| kube::Error::Api(Status::failure(message, "").with_code(code).boxed());
        let text =
            explain(status(404, "the server could not find the requested resource"), "list sessions").to_string();
        assert!(text.contains("not installed"), "{text}");
        let text = explain(status(403, "User \"x\" cannot create aethersessions."), "create session a").to_string();
        assert!(text.contains("create session a") && text.contains("role"), "{text}");
    }
}
