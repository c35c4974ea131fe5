/** Child processes of the VM tests: one-shot tools that must succeed, and the one place that spawns them. */
import { spawn } from 'node:child_process';

export interface ToolResult {
  readonly status: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

export interface ToolOptions {
  readonly input?: string | Uint8Array;
  /** Milliseconds until it is killed; 30 s by default. */
  readonly timeout?: number;
  readonly env?: NodeJS.ProcessEnv;
}

/** What a program does, whatever its exit status. @throws Error when it cannot be started or takes too long. */
export function tryTool(argv: readonly [string, ...string[]], options: ToolOptions = {}): Promise<ToolResult> {
  const [program, ...args] = argv;
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, {
      stdio: ['pipe', 'pipe', 'pipe'],
      env: options.env ?? { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' },
    });
    const timeout = options.timeout ?? 30_000;
    let stdout = '';
    let stderr = '';
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      child.kill('SIGKILL');
    }, timeout);
    child.stdout.setEncoding('utf8').on('data', (text: string) => {
      stdout += text;
    });
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      stderr += text;
    });
    child.stdin.on('error', () => undefined); // the program may end without reading
    child.stdin.end(options.input ?? '');
    child.on('error', (error) => {
      clearTimeout(timer);
      reject(new Error(`Cannot run ${argv.join(' ')}: ${error.message}`));
    });
    child.on('close', (status) => {
      clearTimeout(timer);
      if (late) reject(new Error(`${argv.join(' ')} took more than ${timeout} ms\n${stdout}${stderr}`));
      else resolve({ status, stdout, stderr });
    });
  });
}

/** Standard output of a program that must succeed. @throws Error with all that it said when it does not. */
export async function runTool(argv: readonly [string, ...string[]], options: ToolOptions = {}): Promise<string> {
  const result = await tryTool(argv, options);
  if (result.status === 0) return result.stdout;
  throw new Error(`${argv.join(' ')} exited with ${result.status}\n${result.stderr}${result.stdout}`);
}

/** Asks every `interval` ms until the answer is not undefined. @throws Error "waited … for <what>" after `limit` ms. */
export async function waitFor<T>(
  what: string,
  ask: () => Promise<T | undefined> | T | undefined,
  limit = 20_000,
  interval = 100,
): Promise<T> {
  const end = Date.now() + limit;
  for (;;) {
    const answer = await ask();
    if (answer !== undefined) return answer;
    if (Date.now() > end) throw new Error(`Waited ${limit} ms for ${what}`);
    await new Promise((done) => setTimeout(done, interval));
  }
}
