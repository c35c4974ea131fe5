// `npm test`: the gate. From a fresh clone it installs what is missing, then runs format, lint, types, import directions and every
// test that the rights of this user allow. Without root it says what it left out; in CI (CI=true) nothing may be left out.
import { spawn } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, relative } from 'node:path';
import {
  buildIfStale,
  environment,
  fail,
  installModules,
  installPackages,
  isRoot,
  PACKAGES,
  requireNode,
  root,
  run,
} from './setup.mjs';

requireNode();
const ci = process.env.CI === 'true';
const missing = installPackages(Object.values(PACKAGES).flat());
if (ci && !isRoot) fail('CI runs everything, so it must run as root');
if (ci && missing.length > 0) fail(`packages are missing: ${missing.join(' ')}`);
installModules();

const bin = (name) => join(root, 'node_modules/.bin', name);
console.log('format and lint');
run([bin('biome'), 'check', '--error-on-warnings', '.']);
console.log('types');
run([bin('tsc'), '-p', 'tsconfig.json']);
run([bin('tsc'), '-p', 'lib/tsconfig.pure.json']);
buildIfStale();

const reports = mkdtempSync(join(tmpdir(), 'kvm-ib-test-'));
let passed = 0;
let failed = 0;
const failures = [];
let skipped = 0;

/** Minutes after which a run has hung. */
const TIME_LIMIT = 10;

/** Kernel test files that run side by side: they wait for the kernel and for time more than they work. */
const AT_ONCE = 3;
/** Begun first, since they take longest. */
const LONG = ['interleavings.test.ts', 'change-while-running.test.ts', 'announce-again.test.ts', 'actions.test.ts'];

/** Shows a run of the tests as it goes on; with `quietly` when it has ended. */
async function vitest(project, { prefix = [], file = undefined, quietly = false } = {}) {
  const report = join(reports, `${file?.replaceAll('/', '-') ?? project}.json`);
  const title = `\n${file ?? `${project} tests`}`;
  if (!quietly) console.log(title);
  const argv = [
    ...prefix,
    bin('vitest'),
    'run',
    '--project',
    project,
    '--reporter=default',
    '--reporter=json',
    `--outputFile.json=${report}`,
    ...(file === undefined ? [] : [file]),
  ];
  const child = spawn(argv[0], argv.slice(1), {
    stdio: quietly ? ['ignore', 'pipe', 'pipe'] : 'inherit',
    cwd: root,
    env: environment,
  });
  const said = [title, '\n'];
  for (const stream of [child.stdout, child.stderr]) stream?.on('data', (chunk) => said.push(chunk.toString()));
  const timer = setTimeout(() => {
    said.push(`error: ${file ?? project}: it did not end within ${TIME_LIMIT} minutes\n`);
    child.kill('SIGKILL');
  }, TIME_LIMIT * 60_000);
  const status = await new Promise((resolve) => {
    child.on('error', (error) => {
      said.push(`error: ${file ?? project}: ${error.message}\n`);
      resolve(null);
    });
    child.on('close', resolve);
  });
  clearTimeout(timer);
  if (quietly) process.stdout.write(said.join(''));
  const counts = readCounts(report);
  passed += counts.passed;
  failed += counts.failed;
  skipped += counts.skipped;
  if (status !== 0 && counts.failed === 0) failed += 1;
}

function readCounts(report) {
  try {
    const { numPassedTests, numFailedTests, numPendingTests, testResults } = JSON.parse(readFileSync(report, 'utf8'));
    for (const { name, assertionResults } of testResults) {
      for (const { status, fullName } of assertionResults) {
        if (status === 'failed') failures.push(`${relative(root, name)}: ${fullName}`);
      }
    }
    return { passed: numPassedTests, failed: numFailedTests, skipped: numPendingTests };
  } catch {
    return { passed: 0, failed: 1, skipped: 0 };
  }
}

await vitest('unit');
const leftOut = [];
const inNetns = [join(root, 'scripts/in-netns.sh')];
if (isRoot && missing.length === 0) {
  // Each file in a namespace of its own: what one leaves in its kernel is not there for the next.
  const names = readdirSync(join(root, 'test/kernel')).filter((entry) => entry.endsWith('.test.ts'));
  const queue = [...LONG.filter((name) => names.includes(name)), ...names.filter((name) => !LONG.includes(name))];
  const work = async () => {
    for (let name = queue.shift(); name !== undefined; name = queue.shift()) {
      await vitest('kernel', { prefix: inNetns, file: `test/kernel/${name}`, quietly: true });
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  // Before the namespace is entered: there is no network inside.
  for (const script of ['vm-kernel.mjs', 'vm-sshd.mjs']) run([process.execPath, join('scripts', script)]);
  // One after the other: some measure how soon a guest is heard again.
  for (const name of readdirSync(join(root, 'test/vm')).filter((entry) => entry.endsWith('.test.ts'))) {
    await vitest('vm', { prefix: inNetns, file: `test/vm/${name}` });
  }
} else {
  leftOut.push('kernel tests (network namespaces)', 'vm tests (libvirt, QEMU)');
}
rmSync(reports, { recursive: true, force: true });
for (const what of leftOut) {
  console.log(`left out: ${what}: ${isRoot ? `missing: ${missing.join(' ')}` : 'needs root: sudo npm test'}`);
}
// Their output may be thousands of lines above.
for (const failure of failures) console.log(`failed: ${failure}`);
console.log(`\n${passed} passed, ${failed} failed, ${skipped} skipped`);
process.exit(failed === 0 ? 0 : 1);
