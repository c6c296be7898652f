//! Programs that ask much of a file system, at work in a session and again in a fork of it: git and SQLite, npm and cargo.

use anyhow::{Result, ensure};

use super::{Story, limit};

/// A repository is made, cloned with hard links, packed, checked and compared; the session's own repository takes a commit.
const GIT: &str = r#"
set -eu
export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@example.invalid GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@example.invalid
echo "$1" >>README.md
git commit --quiet --message "$1" README.md
mkdir "$1"
cd "$1"
git init --quiet --initial-branch=main inner
cp -r ../cmd/kubeadm inner/
git -C inner add --all
git -C inner commit --quiet --message first
for i in 1 2 3 4 5; do
    git -C inner mv kubeadm "kubeadm-$i"
    echo $i >inner/number
    git -C inner add number
    git -C inner commit --quiet --message "$i"
    git -C inner mv "kubeadm-$i" kubeadm
    git -C inner commit --quiet --message "back from $i"
done
git clone --quiet inner copy
git -C copy gc --quiet --prune=now
for repository in inner copy; do
    git -C $repository fsck --strict --no-progress
    [ -z "$(git -C $repository status --porcelain)" ]
done
[ "$(git -C inner rev-parse HEAD)" = "$(git -C copy rev-parse HEAD)" ]
diff --recursive --exclude=.git inner copy
echo "commits=$(git -C copy rev-list --count HEAD)"
"#;

/// Two processes write to one database in WAL mode, each transaction acknowledged in a file of its own; begins and returns.
const SQLITE_WRITERS: &str = r#"
import os, sqlite3
database = sqlite3.connect('work.db')
assert database.execute('pragma journal_mode=wal').fetchone() == ('wal',)
database.execute('create table if not exists rows (writer text, number integer, text text)')
database.commit()
database.close()
for writer in ('one', 'two'):
    if os.fork() == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        database = sqlite3.connect('work.db', timeout=60)
        with open(f'/tmp/{writer}', 'w') as acknowledged:
            number = database.execute('select coalesce(max(number), 0) from rows where writer = ?', (writer,)).fetchone()[0]
            while not os.path.exists('/tmp/stop'):
                number += 1
                database.execute('insert into rows values (?, ?, ?)', (writer, number, 'x' * 500))
                database.commit()
                acknowledged.write(f'{number}\n')
                acknowledged.flush()
        database.close()
        open(f'/tmp/{writer}-ended', 'w').close()
        os._exit(0)
"#;

/// Prints the database's check of itself, and for each writer how many rows there are and the number of the last.
const SQLITE_CHECK: &str = r#"
import sqlite3
database = sqlite3.connect('work.db', timeout=60)
print('check=' + database.execute('pragma integrity_check').fetchone()[0])
for writer in ('one', 'two'):
    count, last = database.execute('select count(*), coalesce(max(number), 0) from rows where writer = ?', (writer,)).fetchone()
    print(f'{writer}={count}\n{writer}-last={last}')
"#;

/// Installs the packages of `npm-tree` into folder `$1` of the session and, once per pod, onto the container's own disk: there must
/// be no difference. Says how many files there are.
const NPM: &str = r#"
set -eu
export HOME=/tmp
npm() { node /opt/npm/bin/npm-cli.js "$@" --offline --cache=/tmp/npm-cache --no-audit --no-fund --loglevel=error; }
[ -d /tmp/npm-cache ] || cp -r /opt/npm-cache /tmp/npm-cache
for place in "$PWD/$1" /tmp/plain; do
    [ -d "$place" ] || cp -r /opt/npm-tree "$place"
    (cd "$place" && npm ci && npm ls >/dev/null)
done
diff --recursive --no-dereference "$1/node_modules" /tmp/plain/node_modules
cd "$1"
node_modules/.bin/tsc --version >/dev/null
node -e 'if (typeof require("webpack") !== "function") process.exit(1)'
echo "files=$(find node_modules ! -type d | wc -l)"
"#;

/// Builds the crate of `cargo-tree` in folder `$1` and runs it; says how many crates were compiled and what it printed.
const CARGO: &str = r#"
set -eu
export HOME=/tmp
[ -d "$1" ] || cp -r /opt/cargo-tree "$1"
cd "$1"
cargo build --offline >/tmp/cargo.log 2>&1 || { cat /tmp/cargo.log; exit 1; }
echo "compiled=$(grep -c '^ *Compiling ' /tmp/cargo.log || true)"
echo "said=$(target/debug/cargo-tree a=1)"
"#;

/// npm and cargo in a session; in a fork of it everything is fresh and an edit compiles one crate; both again in the fork.
pub(super) async fn npm_and_cargo(story: &Story) -> Result<String> {
    const BEFORE: &str = r#"hello {"greeting":"hello","numbers":{"a":1}}"#;
    const AFTER: &str = r#"welcome {"greeting":"welcome","numbers":{"a":1}}"#;
    story.source().await?;
    let image = story.site().cluster()?.load_developer(story.first_node()).await?;
    story.session("built").await?;
    developer_pod(story, "builder", "built", image).await?;
    let files = npm(story, "builder", "web").await?;
    let (crates, said) = cargo(story, "builder", "app").await?;
    ensure!(crates > 10 && said == BEFORE, "cargo compiled {crates} crates, the program said {said:?}");

    story.aether(&["fork", "built", "built-fork"]).await?;
    developer_pod(story, "rebuilder", "built-fork", image).await?;
    let (fresh, said) = cargo(story, "rebuilder", "app").await?;
    ensure!(fresh == 0 && said == BEFORE, "cargo compiled {fresh} crates again in the fork, the program said {said:?}");
    story.exec("rebuilder", "sed -i 's/\"hello\"/\"welcome\"/' app/src/main.rs").await?;
    let (edited, said) = cargo(story, "rebuilder", "app").await?;
    ensure!(edited == 1 && said == AFTER, "cargo compiled {edited} crates after an edit, the program said {said:?}");
    let (anew, _) = cargo(story, "rebuilder", "app-of-the-fork").await?;
    ensure!(anew == crates, "cargo compiled {anew} crates in the fork, {crates} in the session");
    for folder in ["web", "web-of-the-fork"] {
        let again = npm(story, "rebuilder", folder).await?;
        ensure!(again == files, "npm installed {again} files into {folder} of the fork, {files} in the session");
    }
    let (left, said) = cargo(story, "builder", "app").await?;
    ensure!(left == 0 && said == BEFORE, "the fork's edit is seen in the session: {left} crates, {said:?}");
    Ok(format!(
        "npm: {files} files as on a plain disk, three times; cargo: {crates} crates, none of them again in the fork, 1 after an edit"
    ))
}

async fn developer_pod(story: &Story, name: &str, claim: &str, image: &str) -> Result<()> {
    let mut pod = story.pod_manifest(name, claim, Some(story.first_node()), false)?;
    pod["spec"]["containers"][0]["image"] = image.into();
    story.apply(&pod.to_string()).await?;
    story.until_pod_ready(name, limit(120)).await
}

async fn npm(story: &Story, pod: &str, folder: &str) -> Result<i64> {
    super::value(&story.exec_with_input(pod, &format!("bash -s -- {folder}"), NPM).await?, "files")
}

async fn cargo(story: &Story, pod: &str, folder: &str) -> Result<(i64, String)> {
    let seen = story.exec_with_input(pod, &format!("bash -s -- {folder}"), CARGO).await?;
    Ok((super::value(&seen, "compiled")?, super::value(&seen, "said")?))
}

/// Git and SQLite in a session, a fork of it under the writers, and both again in the fork.
pub(super) async fn git_and_sqlite(story: &Story) -> Result<String> {
    story.agent("tools", "maker").await?;
    let commits = git(story, "maker", "first").await?;
    start_writers(story, "maker").await?;
    let before = acknowledged(story, "maker").await?;
    story.aether(&["fork", "tools", "tools-fork"]).await?;
    story.pod("twin", "tools-fork", Some(story.first_node())).await?;

    // The fork is one moment: all that was acknowledged before is there, without a gap.
    let forked = check(story, "twin").await?;
    ensure!(
        forked.iter().zip(before).all(|(there, acknowledged)| *there >= acknowledged),
        "the fork has {forked:?}, acknowledged before it were {before:?}"
    );
    ensure!(git(story, "twin", "second").await? == commits, "git made other commits in the fork");
    start_writers(story, "twin").await?;
    let (parent, fork) = (stop_writers(story, "maker").await?, stop_writers(story, "twin").await?);
    Ok(format!(
        "git: {commits} commits, packed and checked, twice; SQLite: {} rows, then {} in the fork, both whole",
        parent.iter().sum::<i64>(),
        fork.iter().sum::<i64>()
    ))
}

async fn git(story: &Story, pod: &str, name: &str) -> Result<i64> {
    let seen = story.exec_with_input(pod, &format!("bash -s -- {name}"), GIT).await?;
    super::value(&seen, "commits")
}

/// Starts the writers of a pod and waits until both have written.
async fn start_writers(story: &Story, pod: &str) -> Result<()> {
    story
        .exec_with_input(
            pod,
            "python3 - && while [ ! -s /tmp/one ] || [ ! -s /tmp/two ]; do sleep 0.05; done",
            SQLITE_WRITERS,
        )
        .await
        .map(drop)
}

/// The rows that a pod's writers have been told are there.
async fn acknowledged(story: &Story, pod: &str) -> Result<[i64; 2]> {
    // The last line may be half written.
    let seen = story.exec(pod, "for w in one two; do echo $w=$(tail -n 2 /tmp/$w | head -n 1); done").await?;
    Ok([super::value(&seen, "one")?, super::value(&seen, "two")?])
}

/// Lets the writers of a pod end, and looks at the database; rows of each.
async fn stop_writers(story: &Story, pod: &str) -> Result<[i64; 2]> {
    let told = "touch /tmp/stop; while [ ! -e /tmp/one-ended ] || [ ! -e /tmp/two-ended ]; do sleep 0.05; done";
    story.exec(pod, told).await?;
    let (rows, told) = (check(story, pod).await?, acknowledged(story, pod).await?);
    ensure!(
        rows.iter().zip(told).all(|(there, told)| *there >= told),
        "{pod} has {rows:?}, acknowledged were {told:?}"
    );
    Ok(rows)
}

/// The database is whole and no row is missing between the first and the last; rows of each writer.
async fn check(story: &Story, pod: &str) -> Result<[i64; 2]> {
    let seen = story.exec_with_input(pod, "python3 -", SQLITE_CHECK).await?;
    ensure!(super::value::<String>(&seen, "check")? == "ok", "the database in {pod} is broken: {seen}");
    let rows: [i64; 2] = [super::value(&seen, "one")?, super::value(&seen, "two")?];
    let last: [i64; 2] = [super::value(&seen, "one-last")?, super::value(&seen, "two-last")?];
    ensure!(rows == last, "rows of the database in {pod} are missing: {seen}");
    Ok(rows)
}
