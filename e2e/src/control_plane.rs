//! etcd, API server, controller-manager and scheduler, as processes of the machine.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Result, bail};
use serde_json::json;

use crate::{
    network::{API_SERVICE, HOST, SERVICES},
    options::Options,
    paths::Paths,
    pki::{Pki, Subject, write_private},
    process::Processes,
    third_party::Programs,
};

/// The API server's address.
pub const SERVER: &str = "https://10.97.0.1:6443";
const ETCD: &str = "http://127.0.0.1:23790";
/// In the order of their start.
pub const PROGRAMS: [&str; 4] = ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"];

/// Makes certificates, kubeconfigs and the audit policy.
pub fn configure(paths: &Paths, pki: &Pki) -> Result<()> {
    pki.create()?;
    let server = Subject {
        name: "kube-apiserver",
        group: None,
        names: &["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"],
        addresses: &[HOST.parse()?, API_SERVICE.parse()?],
    };
    pki.issue("ca", "kube-apiserver", server)?;
    pki.issue("ca", "kubelet-client", Subject::user("kube-apiserver-kubelet-client", Some("system:masters")))?;
    pki.issue("front-proxy-ca", "front-proxy-client", Subject::user("front-proxy-client", None))?;
    write_private(
        &paths.kubeconfig(),
        &pki.kubeconfig(SERVER, Subject::user("kubernetes-admin", Some("system:masters")), "default")?,
    )?;
    Ok(fs::write(audit_policy_file(paths), serde_json::to_vec_pretty(&audit_policy())?)?)
}

/// Starts everything. Does not wait until it is ready.
pub async fn start(
    paths: &Paths,
    pki: &Pki,
    programs: &Programs,
    options: &Options,
    processes: &Processes,
) -> Result<()> {
    let manager = pki.component(SERVER, Subject::user("system:kube-controller-manager", None))?;
    let scheduler = pki.component(SERVER, Subject::user("system:kube-scheduler", None))?;
    processes.start("etcd", &etcd(paths))?;
    processes.start("kube-apiserver", &api_server(paths, pki, programs))?;
    // Both wait for the API server by themselves, but end when it takes long.
    answers(processes).await?;
    processes.start("kube-controller-manager", &controller_manager(paths, pki, programs, options, &manager))?;
    processes.start("kube-scheduler", &self::scheduler(paths, programs, &scheduler))?;
    Ok(())
}

/// Waits until the API server takes connections; whether it is ready is asked through its API.
async fn answers(processes: &Processes) -> Result<()> {
    let until = tokio::time::Instant::now() + Duration::from_secs(60);
    while tokio::net::TcpStream::connect((HOST, 6443)).await.is_err() {
        for name in ["etcd", "kube-apiserver"] {
            if processes.get(name).is_none() {
                bail!("{name} ended: {}", processes.log_tail(name));
            }
        }
        if tokio::time::Instant::now() > until {
            bail!("the API server does not answer: {}", processes.log_tail("kube-apiserver"));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

fn etcd(paths: &Paths) -> Vec<String> {
    line(
        "etcd",
        &[
            ("data-dir", paths.etcd().display().to_string()),
            ("listen-client-urls", ETCD.into()),
            ("advertise-client-urls", ETCD.into()),
            ("listen-peer-urls", "http://127.0.0.1:23800".into()),
            ("initial-advertise-peer-urls", "http://127.0.0.1:23800".into()),
            ("initial-cluster", "default=http://127.0.0.1:23800".into()),
            ("unsafe-no-fsync", "true".into()),
            ("log-level", "warn".into()),
        ],
    )
}

fn api_server(paths: &Paths, pki: &Pki, programs: &Programs) -> Vec<String> {
    line(
        &programs.kubernetes("kube-apiserver"),
        &[
            ("etcd-servers", ETCD.into()),
            ("bind-address", HOST.into()),
            ("advertise-address", HOST.into()),
            ("secure-port", "6443".into()),
            ("service-cluster-ip-range", SERVICES.into()),
            ("client-ca-file", pki.path("ca.crt")),
            ("tls-cert-file", pki.path("kube-apiserver.crt")),
            ("tls-private-key-file", pki.path("kube-apiserver.key")),
            ("kubelet-client-certificate", pki.path("kubelet-client.crt")),
            ("kubelet-client-key", pki.path("kubelet-client.key")),
            ("kubelet-certificate-authority", pki.path("ca.crt")),
            ("kubelet-preferred-address-types", "InternalIP".into()),
            ("service-account-issuer", "https://kubernetes.default.svc".into()),
            ("service-account-key-file", pki.path("service-accounts.pub")),
            ("service-account-signing-key-file", pki.path("service-accounts.key")),
            ("authorization-mode", "Node,RBAC".into()),
            ("enable-admission-plugins", "NodeRestriction".into()),
            ("allow-privileged", "true".into()),
            ("enable-aggregator-routing", "true".into()),
            ("proxy-client-cert-file", pki.path("front-proxy-client.crt")),
            ("proxy-client-key-file", pki.path("front-proxy-client.key")),
            ("requestheader-client-ca-file", pki.path("front-proxy-ca.crt")),
            ("requestheader-allowed-names", "front-proxy-client".into()),
            ("requestheader-username-headers", "X-Remote-User".into()),
            ("requestheader-group-headers", "X-Remote-Group".into()),
            ("requestheader-extra-headers-prefix", "X-Remote-Extra-".into()),
            ("audit-policy-file", audit_policy_file(paths).display().to_string()),
            ("audit-log-path", paths.audit_log().display().to_string()),
            ("cert-dir", paths.cluster().join("apiserver").display().to_string()),
        ],
    )
}

fn controller_manager(
    paths: &Paths,
    pki: &Pki,
    programs: &Programs,
    options: &Options,
    kubeconfig: &str,
) -> Vec<String> {
    let folder: PathBuf = paths.cluster().join("controller-manager");
    line(
        &programs.kubernetes("kube-controller-manager"),
        &[
            ("kubeconfig", kubeconfig.to_owned()),
            ("leader-elect", "false".into()),
            ("bind-address", "127.0.0.1".into()),
            ("port", "0".into()),
            ("cert-dir", folder.display().to_string()),
            ("use-service-account-credentials", "true".into()),
            ("service-account-private-key-file", pki.path("service-accounts.key")),
            ("root-ca-file", pki.path("ca.crt")),
            ("cluster-signing-cert-file", pki.path("ca.crt")),
            ("cluster-signing-key-file", pki.path("ca.key")),
            ("kube-api-qps", options.controller_manager_qps.to_string()),
            ("kube-api-burst", (2 * options.controller_manager_qps).to_string()),
            ("node-monitor-period", "1s".into()),
            ("node-monitor-grace-period", format!("{}s", options.node_grace_seconds)),
            ("flex-volume-plugin-dir", folder.join("volume-plugins").display().to_string()),
        ],
    )
}

fn scheduler(paths: &Paths, programs: &Programs, kubeconfig: &str) -> Vec<String> {
    line(
        &programs.kubernetes("kube-scheduler"),
        &[
            ("kubeconfig", kubeconfig.to_owned()),
            ("leader-elect", "false".into()),
            ("bind-address", "127.0.0.1".into()),
            ("port", "0".into()),
            ("cert-dir", paths.cluster().join("scheduler").display().to_string()),
        ],
    )
}

fn audit_policy_file(paths: &Paths) -> PathBuf {
    paths.cluster().join("audit-policy.json")
}

/// Every write, once, when it is answered; reads and what the control plane does for itself are left out.
fn audit_policy() -> serde_json::Value {
    json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived", "ResponseStarted", "Panic"],
        "rules": [
            {"level": "None", "verbs": ["get", "list", "watch"]},
            {"level": "None", "nonResourceURLs": ["/*"]},
            {"level": "Metadata"},
        ],
    })
}

fn line(program: &str, flags: &[(&str, String)]) -> Vec<String> {
    std::iter::once(program.to_owned()).chain(flags.iter().map(|(name, value)| format!("--{name}={value}"))).collect()
}
