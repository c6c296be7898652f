//! What an agent made is reviewed: asked for, looked at, remarked on, rejected, mended, approved by two and pushed. Every line that
//! somebody types is run as it is shown, by their own rights, and what is shown below it is what came.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use aether_api::commit::CommitPhase;
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Namespace;
use kube::Api;

use super::{Story, limit, say};
use crate::command::{self, Output};
use crate::team::repository::TRUST;
use crate::team::{Team, with_team_at};
use crate::testing::Test;
use crate::tools::Tools;
use crate::wait;

const BRANCH: &str = "agents/fix-login";
/// The test sleeps and hopes; now it waits for what it needs.
const EDIT: &str = "sed -i 's/^sleep 5$/until nc -z localhost 8080; do sleep 0.1; done/' test/login.sh";
/// In the line before, so that the line which was remarked on is another one now.
const MEND: &str = "sed -i '2a (sleep 60; kill $$) &  # whatever happens' test/login.sh";

/// In a namespace of its own, because it is about who may do what there.
pub(super) async fn review(story: &Story) -> Result<String> {
    let test = Test::begin(story.site().clone(), "review").await?;
    let played = with_team_at(&test, "fix-login", async |team| play(story, team).await).await;
    if played.is_err() {
        eprintln!("{}", test.dump().await);
    }
    if std::env::var_os("AETHER_KEEP").is_none() {
        test.end().await?;
        let namespaces: Api<Namespace> = Api::all(test.client.clone());
        wait::gone(&namespaces, &test.namespace, limit(120)).await?;
    }
    played
}

async fn play(story: &Story, team: &Team<'_>) -> Result<String> {
    team.review_everywhere().await?;
    let [ada, grace, linus, paula] = ["ada", "grace", "linus", "paula"].map(|name| Person::new(team, name));
    let clone = team.repository.clone("main").await?;
    let (ada, grace, linus) = (ada?, grace?, linus?);
    let paula = Person { folder: Some(clone.path().to_owned()), ..paula? };
    let ask = format!(
        "kubectl aether commit fix-login --branch {BRANCH} -m 'test: wait for the server, not for five seconds'"
    );

    agent(team, EDIT).await?;
    let first = asked_for(&ada.types(&ask).await?)?;
    team.until_waiting(&first, 0).await?;
    let own = ada.tries(&format!("kubectl aether approve {first}")).await?;
    ensure!(own.code != 0 && own.stdout.contains("forbidden"), "who asks for a commit may approve it: {own:?}");

    let waiting = grace.types("kubectl aether review").await?;
    ensure!(waiting.contains(&first), "the commit is not in what waits");
    let shown = grace.types(&format!("kubectl aether show {first}")).await?;
    ensure!(
        shown.contains("Missing:") && shown.contains("test/login.sh"),
        "it does not say what is missing or changed"
    );
    let diff = grace.types(&format!("kubectl aether diff {first}")).await?;
    ensure!(diff.contains("-sleep 5\n") && !diff.contains('\x1b'), "the diff lacks the edit, or has colours");
    let terminal = grace.at_a_terminal(&format!("kubectl aether diff {first} --no-pager")).await?;
    ensure!(terminal.contains("\x1b["), "a diff at a terminal has no colours: {terminal}");
    grace
        .types(&format!("kubectl aether note add {first} test/login.sh:3 -m 'for ever? please give up after a minute'"))
        .await?;
    grace.types(&format!("kubectl aether reject {first} -m 'see the note'")).await?;
    team.until_phase(&first, CommitPhase::Rejected).await?;

    let shown = ada.types(&format!("kubectl aether show {first} --no-files")).await?;
    ensure!(shown.contains("see the note") && shown.contains("give up after a minute"), "it does not say why");
    agent(team, MEND).await?;
    let listing = team.listing().await?;
    let second = asked_for(&ada.types(&ask).await?)?;
    team.until_waiting(&second, 0).await?;
    let notes = ada.types("kubectl aether note list fix-login").await?;
    let note = notes.lines().find(|line| line.contains("test/login.sh:3") && line.contains("line 4"));
    let note = note.and_then(|line| line.split(' ').next()).context("the note did not follow its line")?;
    ada.types(&format!("kubectl aether note resolve {note}")).await?;

    let diff = grace.types(&format!("kubectl aether diff {first} {second}")).await?;
    ensure!(diff.contains("+(sleep 60") && !diff.contains("sleep 5\n"), "it is not what changed since the rejection");
    grace.types(&format!("kubectl aether approve {second} -m 'thank you'")).await?;
    team.until_waiting(&second, 1).await?;
    let waiting = linus.types("kubectl aether review").await?;
    ensure!(waiting.lines().any(|line| line.contains(&second) && line.contains("1/2")), "one approval of two");
    let shown = linus.types(&format!("kubectl aether show {second}")).await?;
    ensure!(shown.contains("thank you") && shown.contains("1 more approval\n"), "it does not say what is missing");
    let begun = Instant::now();
    let approve = format!("kubectl aether approve {second}");
    let (approved, arrived) = tokio::join!(linus.types(&approve), arrival(team));
    approved?;
    let took = arrived?.duration_since(begun);
    let commit = team.until_phase(&second, CommitPhase::Succeeded).await?;
    team.is_pushed(&commit, &listing).await?;

    paula.types("git fetch --quiet").await?;
    let log = paula.types(&format!("git log -1 origin/{BRANCH}")).await?;
    ensure!(
        log.contains("Approved-by: grace") && log.contains("Approved-by: linus"),
        "the commit does not say by whom"
    );
    paula.types(&format!("git diff --stat main origin/{BRANCH}")).await?;
    let told = linus.types("kubectl aether log fix-login").await?;
    for what in ["rejected", "note ", "approved", "succeeded"] {
        ensure!(told.contains(what), "the log lacks {what:?}");
    }
    // What was rejected stays so, and went nowhere.
    team.until_phase(&first, CommitPhase::Rejected).await?;

    let seconds = took.as_secs_f64();
    story.figure("review_last_approval_to_branch_ms", seconds * 1000.0);
    Ok(format!(
        "rejected once with a note that followed its line, approved by two, the branch on the server {seconds:.1} s after the last approval was typed"
    ))
}

/// When the branch is on the server.
async fn arrival(team: &Team<'_>) -> Result<Instant> {
    let begun = Instant::now();
    while !team.repository.has(BRANCH).await? {
        ensure!(begun.elapsed() < limit(180), "no branch {BRANCH} after {:.0} s", begun.elapsed().as_secs_f64());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(Instant::now())
}

/// The name of the commit that was asked for.
fn asked_for(printed: &str) -> Result<String> {
    printed.split(' ').nth(1).map(str::to_owned).with_context(|| format!("no name of a commit in {printed:?}"))
}

/// The agent does something in its pod.
async fn agent(team: &Team<'_>, line: &str) -> Result<()> {
    say(&format!("agent$ {line}"));
    team.work(line).await.map(drop)
}

/// Somebody at a shell, with a kubeconfig of theirs.
struct Person {
    name: &'static str,
    tools: Tools,
    folder: Option<PathBuf>,
}

impl Person {
    fn new(team: &Team<'_>, name: &'static str) -> Result<Self> {
        Ok(Self { name, tools: team.of(name)?, folder: None })
    }

    /// They type a line, which works; what they see.
    async fn types(&self, line: &str) -> Result<String> {
        let output = self.tries(line).await?;
        ensure!(output.code == 0, "{line} exited with {}: {}", output.code, output.stdout);
        Ok(output.stdout)
    }

    /// They type a line.
    async fn tries(&self, line: &str) -> Result<Output> {
        say(&format!("{}$ {line}", self.name));
        let mut command = self.tools.typed(line);
        if let Some(folder) = &self.folder {
            command.current_dir(folder).env_remove(TRUST);
        }
        let output = command::output(&mut command, None).await?;
        output.stdout.lines().for_each(say);
        Ok(output)
    }

    /// What they would see at a terminal, with what commands it.
    async fn at_a_terminal(&self, line: &str) -> Result<String> {
        let line = format!("TERM=xterm script --quiet --return --command '{line}' /dev/null");
        Ok(command::expect_success(&mut self.tools.typed(&line)).await?.stdout)
    }
}
