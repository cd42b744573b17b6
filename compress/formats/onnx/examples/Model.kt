// The bundle's model through ONNX Runtime, written from manifest.json. Not compiled where it was written.
// Gradle: implementation("com.microsoft.onnxruntime:onnxruntime-android:{{version}}"), the version that the self-test passed
// with. Put the folder model/ into src/main/assets.
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import android.content.Context
import android.system.Os
import java.nio.FloatBuffer
import java.nio.LongBuffer

class Model(context: Context) : AutoCloseable {
    init {
        Os.setenv("ORT_DISABLE_TELEMETRY", "1", true) // read at the start; else Microsoft is told of each process
    }

    private val environment = OrtEnvironment.getEnvironment()
    private val session = environment.createSession(context.assets.open("{{model}}").readBytes())

    /** One output for one row of token ids; what the graph doesn't take is left out. */
    fun run(ids: Map<String, LongArray>, output: String): FloatArray = run(
        ids.filterKeys { it in session.inputNames }.mapValues { (_, values) ->
            OnnxTensor.createTensor(environment, LongBuffer.wrap(values), longArrayOf(1, values.size.toLong()))
        },
        output,
    )

    /** One output for one row of floats. */
    fun run(input: String, values: FloatArray, shape: LongArray, output: String): FloatArray =
        run(mapOf(input to OnnxTensor.createTensor(environment, FloatBuffer.wrap(values), shape)), output)

    @JvmName("runTensors")
    private fun run(feed: Map<String, OnnxTensor>, output: String): FloatArray = try {
        session.run(feed, setOf(output)).use { result ->
            val found = (result[0] as OnnxTensor).floatBuffer
            FloatArray(found.remaining()).also { found.get(it) }
        }
    } finally {
        feed.values.forEach { it.close() }
    }

    override fun close() = session.close()
}
