//! One line of the list: an account, and what it may do.

use std::str::FromStr;

use super::Permission;

/// How Kubernetes calls service accounts among users.
pub(super) const ACCOUNTS: &str = "system:serviceaccount:";

/// What a service account may do. Written as `system:serviceaccount:NAMESPACE:NAME=read,write`; the namespace `*` is any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Any when there is none.
    namespace: Option<String>,
    name: String,
    permissions: Vec<Permission>,
}

impl Grant {
    /// Whether it gives `permission` to the account of this user name.
    pub(super) fn gives(&self, permission: Permission, account: &str) -> bool {
        let Some((namespace, name)) = account.strip_prefix(ACCOUNTS).and_then(|rest| rest.split_once(':')) else {
            return false;
        };
        self.name == name
            && self.namespace.as_deref().is_none_or(|granted| granted == namespace)
            && self.permissions.contains(&permission)
    }
}

impl FromStr for Grant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = || format!("{text:?} is not of the form {ACCOUNTS}NAMESPACE:NAME=read,write,pin,admin");
        let (account, permissions) = text.split_once('=').ok_or_else(expected)?;
        let rest = account.strip_prefix(ACCOUNTS).ok_or_else(expected)?;
        let (namespace, name) = rest.split_once(':').ok_or_else(expected)?;
        // A name with a wildcard would grant to accounts that nobody has thought of.
        if namespace.is_empty() || name.is_empty() || name.contains([':', '*']) {
            return Err(expected());
        }
        let permissions = permissions.split(',').map(|one| one.trim().parse()).collect::<Result<_, _>>()?;
        Ok(Self { namespace: (namespace != "*").then(|| namespace.into()), name: name.into(), permissions })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_is_for_one_name_in_one_namespace_or_in_all() {
        let one: Grant = "system:serviceaccount:aether-system:aether-driver=read,write".parse().unwrap();
        assert!(one.gives(Permission::Read, "system:serviceaccount:aether-system:aether-driver"));
        for other in [
            "system:serviceaccount:agents:aether-driver",
            "system:serviceaccount:aether-system:default",
            "aether-driver",
        ] {
            assert!(!one.gives(Permission::Read, other), "{other}");
        }
        assert!(!one.gives(Permission::Pin, "system:serviceaccount:aether-system:aether-driver"));
        let any: Grant = "system:serviceaccount:*:aether-importer=write".parse().unwrap();
        assert!(any.gives(Permission::Write, "system:serviceaccount:platform:aether-importer"));
        assert!(!any.gives(Permission::Read, "system:serviceaccount:platform:aether-importer"));
        assert!(!any.gives(Permission::Write, "system:serviceaccount:platform:default"));
    }

    #[test]
    fn a_bad_grant_says_what_is_expected() {
        for bad in [
            "alice=read",
            "system:serviceaccount:a:b",
            "system:serviceaccount:a=read",
            "system:serviceaccount:a:*=read",
            "system:serviceaccount::b=read",
            "system:serviceaccount:a:b=read,,write",
            "system:serviceaccount:a:b=",
        ] {
            let error = bad.parse::<Grant>().unwrap_err();
            assert!(error.contains("read, write") || error.contains("read,write"), "{bad}: {error}");
        }
    }
}
